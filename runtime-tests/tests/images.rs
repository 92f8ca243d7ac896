//! Images: every packing, every way to name them, what the registry does wrong, what stays and what goes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, refused};
use runtime_tests::image::{catalog, push};
use runtime_tests::registry::{Docker, Fault};

#[tokio::test]
async fn every_packing_gives_a_container_that_runs() -> Result<()> {
    let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let pod = bed.host_pod("packings").await?;
    for (name, reference) in [
        ("zstd", catalog::SMALL),
        ("index", catalog::INDEXED),
        ("plain", catalog::PLAIN),
        ("docker", catalog::BUSYBOX),
    ] {
        bed.client.pull(reference).await.with_context(|| reference.to_owned())?;
        assert_eq!(pod.output(&container(name, reference, "echo runs")).await?, (0, "runs\n".into()));
    }
    Ok(())
}

#[tokio::test]
async fn layers_replace_and_delete_what_is_below() -> Result<()> {
    let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    bed.client.pull(catalog::WHITEOUTS).await?;
    let pod = bed.host_pod("whiteouts").await?;
    let script = "cd /w; find . | sort; cat kept replaced opaque/new";
    let (_, said) = pod.output(&container("c", catalog::WHITEOUTS, script)).await?;
    assert_eq!(said, ".\n./kept\n./opaque\n./opaque/new\n./replaced\nfirst\nthird\nsecond\n");
    Ok(())
}

#[tokio::test]
async fn an_image_has_one_id_by_whatever_name_it_is_called() -> Result<()> {
    let store = catalog::ensure()?;
    let digest = store.references[catalog::SMALL].digest.clone();
    let bed = Bed::with(store, |_| {}).await?;
    let by_tag = bed.client.pull(catalog::SMALL).await?;
    let named = format!("crisp.test/small@{digest}");
    assert_eq!(bed.client.pull(&named).await?, by_tag);
    let image = bed.client.image_status(&by_tag).await?.context("not found by id")?;
    assert_eq!(
        (image.id.as_str(), image.repo_tags.as_slice()),
        (by_tag.as_str(), &[catalog::SMALL.to_owned()][..])
    );
    assert_eq!(image.repo_digests, [named.as_str()]);
    ensure!(image.size > 500_000, "a size of {}", image.size);
    for name in [catalog::SMALL, &named, &by_tag, by_tag.trim_start_matches("sha256:"), &by_tag[7..20]] {
        let found = bed.client.image_status(name).await?.with_context(|| format!("not found by {name}"))?;
        assert_eq!(found.id, by_tag);
    }
    let pod = bed.host_pod("named").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let status = bed.client.status(&id).await?;
    assert_eq!(status.image_id, by_tag);
    assert_eq!(status.image.map(|i| i.image), Some(catalog::SMALL.to_owned()));
    assert_eq!(status.image_ref, named);
    Ok(())
}

#[tokio::test]
async fn an_image_in_use_can_be_removed_and_its_container_runs_on() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("inuse").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    bed.client.remove_image(catalog::SMALL).await?;
    assert!(bed.client.images().await?.is_empty());
    assert_eq!(bed.client.sh(&id, "ls /bin/busybox").await?, "/bin/busybox");
    bed.client.remove(&id).await?;
    bed.client.pull(catalog::SMALL).await?;
    assert_eq!(pod.output(&container("again", catalog::SMALL, "echo back")).await?.1, "back\n");
    Ok(())
}

#[tokio::test]
async fn a_download_that_breaks_is_taken_up_where_it_broke() -> Result<()> {
    let store = catalog::ensure()?;
    let layer = store.closure(&store.references[catalog::SMALL])?[0].clone();
    let bed = Bed::with(store, |_| {}).await?;
    let half = usize::try_from(layer.size / 2)?;
    bed.registry.fail(&layer.digest, Fault::CutAfter(half), Some(1));
    bed.client.pull(catalog::SMALL).await?;
    let asked: Vec<String> =
        bed.registry.requests().into_iter().filter(|r| r.contains(&layer.digest)).collect();
    ensure!(asked.len() == 2 && asked[1].ends_with('-'), "the rest was not asked for by range: {asked:?}");
    // Nothing listed twice, nothing left of the first try.
    assert_eq!(bed.client.images().await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn errors_that_pass_are_tried_again_and_those_that_stay_are_told() -> Result<()> {
    let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    bed.registry.fail("/blobs/", Fault::Status(503), Some(1));
    bed.client.pull(catalog::SMALL).await?;
    bed.client.remove_image(catalog::SMALL).await?;
    bed.registry.fail("/blobs/", Fault::Status(500), None);
    let clock = Instant::now();
    refused(bed.client.pull(catalog::SMALL).await)?;
    ensure!(clock.elapsed() < Duration::from_secs(60), "it took {:?} to give up", clock.elapsed());
    ensure!(bed.registry.requests().len() < 60, "{} requests", bed.registry.requests().len());
    assert!(bed.client.images().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_stalled_download_is_cut() -> Result<()> {
    let bed = Bed::with(catalog::ensure()?, |options| {
        options.images = "image_pull_progress_timeout = \"1s\"".to_owned();
    })
    .await?;
    bed.registry.fail("/blobs/", Fault::StallAfter(1000), Some(1));
    let clock = Instant::now();
    bed.client.pull(catalog::SMALL).await?;
    ensure!(clock.elapsed() < Duration::from_secs(20), "the stall was not cut within {:?}", clock.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_pull_given_up_leaves_nothing_and_can_be_made_again() -> Result<()> {
    let mut bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let before = bed.daemon.traces();
    for millis in [1, 5, 20] {
        tokio::time::timeout(Duration::from_millis(millis), bed.client.pull(catalog::BUSYBOX)).await.ok();
    }
    bed.client.pull(catalog::BUSYBOX).await?;
    bed.client.remove_image(catalog::BUSYBOX).await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn equal_pulls_download_once() -> Result<()> {
    let store = catalog::ensure()?;
    let layer = store.closure(&store.references[catalog::SMALL])?[0].digest.clone();
    let bed = Bed::with(store, |_| {}).await?;
    let pulls = (0..10).map(|_| {
        let client = bed.client.clone();
        tokio::spawn(async move { client.pull(catalog::SMALL).await })
    });
    for pull in pulls.collect::<Vec<_>>() {
        pull.await??;
    }
    let downloads =
        bed.registry.requests().into_iter().filter(|r| r.starts_with("GET") && r.contains(&layer)).count();
    assert_eq!(downloads, 1);
    Ok(())
}

#[tokio::test]
async fn the_image_file_system_is_measured_exactly() -> Result<()> {
    let bed = Bed::with(catalog::ensure()?, |_| {}).await?;
    let used = || async {
        let info = bed.client.image_fs().await?;
        let first = info.image_filesystems.into_iter().next().context("no file system")?;
        ensure!(first.fs_id.is_some_and(|id| id.mountpoint.starts_with('/')), "no mountpoint");
        Ok::<_, anyhow::Error>((
            first.used_bytes.context("no bytes")?.value,
            first.inodes_used.context("no inodes")?.value,
        ))
    };
    let (empty, _) = used().await?;
    bed.client.pull(catalog::BUSYBOX).await?;
    let (full, inodes) = used().await?;
    ensure!(
        (2 << 20..20 << 20).contains(&(full - empty)) && inodes > 10,
        "{empty} and then {full}, {inodes} inodes"
    );
    bed.client.remove_image(catalog::BUSYBOX).await?;
    let (after, _) = used().await?;
    ensure!(after < empty + (1 << 20), "{after} bytes after everything was removed");
    Ok(())
}

#[tokio::test]
async fn a_registry_of_the_world_is_understood() -> Result<()> {
    let store = catalog::ensure()?;
    let docker = Docker::start(&store)?;
    let bed = Bed::with(store, |options| options.registry = Some(docker.address())).await?;
    for reference in [catalog::SMALL, catalog::INDEXED, catalog::NGINX] {
        bed.client.pull(reference).await.with_context(|| reference.to_owned())?;
    }
    // Loopback is spoken to without TLS, and by its own name.
    let (repository, tag) = push::split(catalog::SMALL)?;
    bed.client.pull(&format!("{}/{repository}:{tag}", docker.address())).await?;
    let image = bed.client.image_status(catalog::SMALL).await?.context("absent")?;
    assert_eq!(image.repo_tags.len(), 3, "{:?}", image.repo_tags);
    Ok(())
}
