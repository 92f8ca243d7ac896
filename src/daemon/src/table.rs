//! Objects by id, and by unique prefix of an id. Holds no lock longer than a look takes.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use crate::lock::Lock;

/// Ids in order, so that a prefix is a range.
pub struct Table<T> {
    objects: Lock<BTreeMap<String, Arc<T>>>,
}

/// What an id or a prefix names.
#[derive(Debug, PartialEq)]
pub enum Found<T> {
    One(T),
    None,
    Many,
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table { objects: Lock::default() }
    }
}

impl<T> Table<T> {
    pub fn insert(&self, id: &str, object: Arc<T>) {
        self.objects.write().insert(id.into(), object);
    }

    pub fn remove(&self, id: &str) -> Option<Arc<T>> {
        self.objects.write().remove(id)
    }

    pub fn get(&self, id: &str) -> Option<Arc<T>> {
        self.objects.read().get(id).cloned()
    }

    /// The object whose id is `prefix` or, when there is one only, starts with it. The empty prefix names nothing.
    pub fn find(&self, prefix: &str) -> Found<Arc<T>> {
        let objects = self.objects.read();
        if prefix.is_empty() {
            return Found::None;
        }
        let mut range = objects.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        match range.next() {
            Some((id, object)) if id == prefix => Found::One(object.clone()),
            Some((id, object)) if id.starts_with(prefix) => match range.next() {
                Some((next, _)) if next.starts_with(prefix) => Found::Many,
                _ => Found::One(object.clone()),
            },
            _ => Found::None,
        }
    }

    /// All objects, in the order of their ids.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.objects.read().values().cloned().collect()
    }

    /// The objects of which something holds.
    pub fn with(&self, holds: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        self.objects.read().values().filter(|object| holds(object)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ids: &[&str]) -> Table<String> {
        let table = Table::default();
        ids.iter().for_each(|id| table.insert(id, Arc::new(id.to_string())));
        table
    }

    #[test]
    fn a_prefix_names_an_object_when_it_is_the_only_one() {
        let table = table(&["abc1", "abd2", "abd3"]);
        for (prefix, found) in [
            ("abc1", Found::One("abc1")),
            ("abc", Found::One("abc1")),
            ("abd", Found::Many),
            ("ab", Found::Many),
            ("abd3", Found::One("abd3")),
            ("abd33", Found::None),
            ("b", Found::None),
            ("", Found::None),
        ] {
            let got = match table.find(prefix) {
                Found::One(object) => Found::One(object.to_string()),
                Found::None => Found::None,
                Found::Many => Found::Many,
            };
            let want = match found {
                Found::One(id) => Found::One(id.to_string()),
                Found::None => Found::None,
                Found::Many => Found::Many,
            };
            assert_eq!(got, want, "{prefix}");
        }
    }

    #[test]
    fn a_whole_id_wins_over_longer_ones() {
        let table = table(&["ab", "abc"]);
        assert_eq!(table.find("ab"), Found::One(Arc::new("ab".to_string())));
    }
}
