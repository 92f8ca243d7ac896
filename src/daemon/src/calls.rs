//! Lets a repeated call join the one in flight. The work runs in a task of its own, so that a client that goes
//! away neither stops it half-way nor blocks the name: the repetition gets the result.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};

use crate::error::{Fault, Result};

type Call = Shared<BoxFuture<'static, Result<String>>>;

/// Calls in flight by the name of what they make.
#[derive(Clone, Default)]
pub struct Calls {
    running: Arc<Mutex<HashMap<String, Call>>>,
}

impl Calls {
    /// Waits for the call in flight under this name, or for `work`, which is begun when there is none.
    pub async fn join<F>(&self, name: String, work: impl FnOnce() -> F) -> Result<String>
    where
        F: Future<Output = Result<String>> + Send + 'static,
    {
        let call = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(&name) {
                Some(call) => call.clone(),
                None => {
                    let call = self.begin(name.clone(), work());
                    running.insert(name, call.clone());
                    call
                }
            }
        };
        call.await
    }

    fn begin(&self, name: String, work: impl Future<Output = Result<String>> + Send + 'static) -> Call {
        let calls = self.clone();
        let task = tokio::spawn(async move {
            let done = Done { calls, name };
            let result = work.await;
            drop(done);
            result
        });
        async move { task.await.unwrap_or_else(|_| Err(Fault::Panicked("the call").into())) }.boxed().shared()
    }
}

/// Frees the name, also when the work panics.
struct Done {
    calls: Calls,
    name: String,
}

impl Drop for Done {
    fn drop(&mut self) {
        self.calls.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn the_second_caller_gets_the_result_of_the_first() {
        let (calls, begun, gate) =
            (Calls::default(), Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let work = || {
            let (begun, gate) = (begun.clone(), gate.clone());
            async move {
                let number = begun.fetch_add(1, Ordering::SeqCst);
                let _ = gate.acquire().await;
                Ok(number.to_string())
            }
        };
        let (a, b) = (calls.join("n".into(), work), calls.join("n".into(), work));
        let release = async {
            tokio::task::yield_now().await;
            gate.add_permits(1);
        };
        let (a, b, ()) = tokio::join!(a, b, release);
        assert_eq!((a.unwrap(), b.unwrap()), ("0".into(), "0".into()));
        assert_eq!(calls.join("n".into(), work).await.unwrap(), "1");
    }

    #[tokio::test]
    async fn the_work_goes_on_when_its_caller_goes_away() {
        let (calls, gate) = (Calls::default(), Arc::new(Semaphore::new(0)));
        let inner = gate.clone();
        let first = calls.join("n".into(), || async move {
            let _ = inner.acquire().await;
            Ok("first".to_string())
        });
        assert!(first.now_or_never().is_none());
        let second = calls.join("n".into(), || async { Ok("second".to_string()) });
        gate.add_permits(1);
        assert_eq!(second.await.unwrap(), "first");
    }

    #[tokio::test]
    async fn a_panic_frees_the_name() {
        let calls = Calls::default();
        let gone = calls.join("n".into(), || async { panic!("boom") }).await;
        assert!(matches!(*gone.unwrap_err(), Fault::Panicked(_)));
        assert_eq!(calls.join("n".into(), || async { Ok("again".into()) }).await.unwrap(), "again");
    }
}
