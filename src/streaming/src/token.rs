//! Tokens: a client gets one with its URL and comes back with it, once and soon. 128 random bits, so that nobody
//! finds one by trying; looked up by a keyed hash, so that time tells nothing of how near a guess came.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// So many requests may wait for their client.
const MOST: usize = 1000;

/// Too many tokens are waiting for their clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST} streaming requests are waiting for their clients")]
pub struct Full;

/// Requests that wait for their clients.
#[derive(Debug)]
pub(crate) struct Tokens<T> {
    lifetime: Duration,
    waiting: Mutex<HashMap<String, (Instant, T)>>,
}

impl<T> Tokens<T> {
    pub(crate) fn new(lifetime: Duration) -> Tokens<T> {
        Tokens { lifetime, waiting: Mutex::default() }
    }

    /// A token for a request.
    pub(crate) fn issue(&self, request: T) -> Result<String, Full> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MOST {
            waiting.retain(|_, (since, _)| since.elapsed() < self.lifetime);
        }
        if waiting.len() >= MOST {
            return Err(Full);
        }
        let mut bits = [0; 16];
        // The kernel's generator fails only before it was ever seeded.
        getrandom::fill(&mut bits).map_err(|_| Full)?;
        let token = URL_SAFE_NO_PAD.encode(bits);
        waiting.insert(token.clone(), (Instant::now(), request));
        Ok(token)
    }

    /// The request of a token, the first time and in time.
    pub(crate) fn take(&self, token: &str) -> Option<T> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, request) = waiting.remove(token)?;
        (since.elapsed() < self.lifetime).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once() {
        let tokens = Tokens::new(Duration::from_secs(60));
        let token = tokens.issue(7).unwrap();
        assert_eq!(token.len(), 22);
        assert_eq!((tokens.take("other"), tokens.take(&token), tokens.take(&token)), (None, Some(7), None));
    }

    #[test]
    fn an_old_token_is_worth_nothing_and_makes_room() {
        let tokens = Tokens::new(Duration::ZERO);
        let token = tokens.issue(0).unwrap();
        assert_eq!(tokens.take(&token), None);
        (0..=2 * MOST).for_each(|n| drop(tokens.issue(n).unwrap()));
    }

    #[test]
    fn tokens_that_wait_are_bounded() {
        let tokens = Tokens::new(Duration::from_secs(60));
        (0..MOST).for_each(|n| drop(tokens.issue(n).unwrap()));
        assert_eq!(tokens.issue(0), Err(Full));
    }
}
