//! Pulls one image into a directory and says how long it took: `pull <directory> <reference>`. For measuring, and for
//! looking at what a registry does without a daemon around it.

use std::time::Instant;

use image::{Config, Images, Unpacker};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "unpack") {
        image::unpack_main();
    }
    let [directory, reference] = arguments.as_slice() else {
        return Err("usage: pull <directory> <reference>".into());
    };
    std::fs::create_dir_all(directory)?;
    let unpacker = Unpacker::new(vec!["/proc/self/exe".into(), "unpack".into()]);
    let directory = std::path::Path::new(directory);
    let config = Config::new(directory.join("images"), directory.join("images.db"), unpacker);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let images = Images::open(config).await?;
        let started = Instant::now();
        let image = images.pull(reference, None).await?;
        let took = started.elapsed();
        let usage = images.usage().await?;
        println!("{} in {:.3} s", image.id, took.as_secs_f64());
        println!("{} layers, {} bytes, {} inodes", image.diff_ids.len(), usage.bytes, usage.inodes);
        Ok(())
    })
}
