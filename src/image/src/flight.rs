//! One piece of work however many ask for it. The work runs as a task of its own; it is aborted when the last one
//! who waits for it goes away, and everything that it holds is undone by its destructors.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::error::{Error, Result};

/// Work under way, by what it makes.
pub(crate) struct Flights<K, V> {
    under_way: Mutex<HashMap<K, Weak<Flight<V>>>>,
}

struct Flight<V> {
    task: AbortHandle,
    result: watch::Receiver<Option<Result<V>>>,
}

impl<V> Drop for Flight<V> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A result, and whether this caller was the one who started the work.
pub(crate) struct Landed<V> {
    pub(crate) result: Result<V>,
    pub(crate) ours: bool,
}

impl<K, V> Flights<K, V>
where
    K: Hash + Eq + Clone,
    V: Clone + Send + Sync + 'static,
{
    pub(crate) fn new() -> Flights<K, V> {
        Flights { under_way: Mutex::new(HashMap::new()) }
    }

    /// Waits for the work of this key, starting it if nobody has.
    pub(crate) async fn join<F>(&self, key: K, start: impl FnOnce() -> F) -> Landed<V>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let (flight, ours) = {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            let running = under_way.get(&key).and_then(Weak::upgrade);
            match running
                .filter(|flight| flight.result.borrow().is_none() && flight.result.has_changed().is_ok())
            {
                Some(flight) => (flight, false),
                None => {
                    let (sender, result) = watch::channel(None);
                    let work = start();
                    let task = tokio::spawn(async move {
                        let result = work.await;
                        sender.send_replace(Some(result));
                    });
                    let flight = Arc::new(Flight { task: task.abort_handle(), result });
                    under_way.retain(|_, flight| flight.strong_count() > 0);
                    under_way.insert(key, Arc::downgrade(&flight));
                    (flight, true)
                }
            }
        };
        let mut result = flight.result.clone();
        let result = match result.wait_for(Option::is_some).await {
            Ok(value) => value.clone().unwrap_or(Err(Error::Cancelled)),
            // The sender went away without a word: the work panicked.
            Err(_) => Err(Error::Cancelled),
        };
        Landed { result, ours }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[tokio::test(flavor = "multi_thread")]
    async fn many_who_ask_share_one_piece_of_work() {
        let flights = Arc::new(Flights::<u8, usize>::new());
        let runs = Arc::new(AtomicUsize::new(0));
        let ask = |flights: Arc<Flights<u8, usize>>, runs: Arc<AtomicUsize>| async move {
            let work = move || async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Ok(runs.fetch_add(1, Ordering::SeqCst))
            };
            flights.join(1, work).await.result.unwrap()
        };
        let all: Vec<_> = (0..20).map(|_| tokio::spawn(ask(flights.clone(), runs.clone()))).collect();
        for one in all {
            assert_eq!(one.await.unwrap(), 0);
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert_eq!(ask(flights, runs).await, 1);
    }

    #[tokio::test]
    async fn work_ends_when_the_last_who_waits_goes_away_and_not_before() {
        struct Gone(Arc<AtomicUsize>);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let flights = Arc::new(Flights::<u8, ()>::new());
        let gone = Arc::new(AtomicUsize::new(0));
        let wait = |flights: Arc<Flights<u8, ()>>, gone: Arc<AtomicUsize>| async move {
            let guard = Gone(gone);
            let work = move || async move {
                let _guard = guard;
                std::future::pending::<Result<()>>().await
            };
            flights.join(1, work).await.result
        };
        let first = tokio::spawn(wait(flights.clone(), gone.clone()));
        tokio::time::sleep(Duration::from_millis(20)).await;
        let second = tokio::spawn(wait(flights.clone(), Arc::new(AtomicUsize::new(0))));
        tokio::time::sleep(Duration::from_millis(20)).await;
        first.abort();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(gone.load(Ordering::SeqCst), 0);
        second.abort();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(gone.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn work_that_panics_answers_and_can_be_asked_for_again() {
        let flights = Flights::<u8, u8>::new();
        assert!(flights.join(1, || async { panic!("on purpose") }).await.result.is_err());
        assert_eq!(flights.join(1, || async { Ok(7) }).await.result.unwrap(), 7);
    }
}
