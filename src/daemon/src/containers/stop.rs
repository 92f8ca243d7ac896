//! Stops a container: its stop signal, a time of grace, then SIGKILL. Answers when the exit is recorded, and says so
//! when the process cannot be killed.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout};
use tracing::warn;

use super::{Container, Phase, record, spec::signal};
use crate::{
    daemon::{Daemon, now},
    error::{Fault, Result},
    shim,
    table::Found,
};

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;
/// How long an exit may take after SIGKILL. With it a stop ends within its timeout plus two seconds.
const DEATH: Duration = Duration::from_millis(1800);
/// Longer graces than ten years are ten years.
const LONGEST: u64 = 10 * 365 * 24 * 3600;

/// Stops a container; unknown ones, and such as do not run, are stopped. Calls at the same time share one stop:
/// the shortest grace counts.
pub async fn stop(daemon: &Arc<Daemon>, id: &str, grace: i64) -> Result<()> {
    let container = match daemon.containers.find(id) {
        Found::One(container) => container,
        Found::None => return Ok(()),
        Found::Many => return Err(Fault::Ambiguous(id.into()).into()),
    };
    end(daemon, &container, Duration::from_secs(u64::try_from(grace).unwrap_or(0).min(LONGEST))).await
}

/// The same for a container at hand.
pub async fn end(daemon: &Arc<Daemon>, container: &Arc<Container>, grace: Duration) -> Result<()> {
    // One that is being started first gets to its state. A start may hang in a mount, a stop must not.
    let waited = timeout(grace + DEATH, container.act.lock()).await.map(drop);
    waited.map_err(|_| Fault::Deadline {
        act: format!("start of container {}", container.id),
        after: grace + DEATH,
    })?;
    if container.phase() != Phase::Running {
        return Ok(());
    }
    let first = container.stop_within(grace);
    if first {
        // A stop that was begun is carried on after the daemon's death.
        let by = now().saturating_add(i64::try_from(grace.as_nanos()).unwrap_or(i64::MAX));
        container.change(|state| state.stop_by = Some(by));
        daemon.store.put_later(record::row(container));
        if !grace.is_zero()
            && let Ok(sent) = timeout(grace, send(container, number(container), false)).await
        {
            sent?;
        }
    }
    if container.grace_over().await {
        return Ok(());
    }
    let killed = timeout(DEATH, async {
        send(container, SIGKILL, true).await?;
        container.ended().await;
        Ok(())
    });
    if let Ok(result) = killed.await {
        return result;
    }
    let stuck = container.look(|state| state.pid != 0 && shim::letter(state.pid) == Some('D'));
    match stuck {
        true => Err(Fault::Unkillable(container.id.clone()).into()),
        false => Err(Fault::Deadline {
            act: format!("end of container {} by SIGKILL", container.id),
            after: DEATH,
        }
        .into()),
    }
}

/// Linux's number of the signal that asks the container to stop.
fn number(container: &Container) -> u32 {
    let wanted = signal::from_cri(container.facts.stop_signal).and_then(|number| u32::try_from(number).ok());
    wanted.filter(|number| *number != 0).unwrap_or(SIGTERM)
}

/// A process that is gone needs no signal; a shim that is gone takes its containers with it, and its watch tells.
async fn send(container: &Container, signal: u32, all: bool) -> Result<()> {
    let Some(shim) = container.pod.shim() else { return Ok(()) };
    match shim.signal(&container.id, "", signal, all).await {
        Ok(()) | Err(shim::Error::NotFound(_) | shim::Error::State(_) | shim::Error::Gone) => Ok(()),
        Err(e) => {
            warn!(container = %container.id, signal, error = %e, "signal");
            Err(Fault::shim(format!("signal container {}", container.id))(e))
        }
    }
}

impl Container {
    /// Shortens the grace of the stop in flight, or begins one. True for the one who began it.
    fn stop_within(&self, grace: Duration) -> bool {
        let by = Instant::now() + grace;
        let mut first = false;
        self.stop_by.send_if_modified(|current| {
            first = current.is_none();
            let shorter = current.is_none_or(|current| by < current);
            if shorter {
                *current = Some(by);
            }
            shorter
        });
        first
    }

    /// Returns true when the container has ended, false when the grace is over, whichever comes first.
    async fn grace_over(&self) -> bool {
        let mut stop_by = self.stop_by.subscribe();
        loop {
            let by = stop_by.borrow_and_update().unwrap_or_else(Instant::now);
            tokio::select! {
                () = self.ended() => return true,
                () = tokio::time::sleep_until(by) => return false,
                // The grace was shortened. The sender lives in self, so this is the only way it resolves.
                _ = stop_by.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        containers::Facts,
        pods::{Place, Pod},
    };

    fn container() -> Container {
        let pod = Pod::new("p".into(), Default::default(), String::new(), 1, Place::default());
        let container = Container::new("c".into(), Arc::new(pod), Default::default(), 1, Facts::default());
        container.change(|state| state.phase = Phase::Running);
        container
    }

    #[tokio::test(start_paused = true)]
    async fn the_shortest_grace_counts() {
        let container = container();
        let begun = Instant::now();
        assert!(container.stop_within(Duration::from_secs(60)));
        let shorten = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(!container.stop_within(Duration::from_secs(2)));
            assert!(!container.stop_within(Duration::from_secs(100)));
        };
        let (ended, ()) = tokio::join!(container.grace_over(), shorten);
        assert!(!ended);
        assert_eq!(begun.elapsed().as_secs(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_exit_ends_the_grace() {
        let container = container();
        container.stop_within(Duration::from_secs(60));
        let exit = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            container.change(|state| state.phase = Phase::Exited);
        };
        let (ended, ()) = tokio::join!(container.grace_over(), exit);
        assert!(ended);
    }
}
