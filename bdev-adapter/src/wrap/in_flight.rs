//! The requests of a wrapper that the device inside has: under tags of the wrapper's own, each with what the wrapper wants
//! to know again when the answer comes.

/// A table of what is in flight. The tag is a place in it, so looking one up costs nothing, and places are used again: a
/// table at work allocates nothing.
#[derive(Debug)]
pub(super) struct InFlight<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for InFlight<T> {
    fn default() -> InFlight<T> {
        InFlight { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> InFlight<T> {
    /// Remembers `what`; returns the tag for the device inside.
    pub(super) fn insert(&mut self, what: T) -> u64 {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.places.push(None);
                self.places.len() - 1
            }
        };
        self.places[place] = Some(what);
        place as u64
    }

    /// What was remembered under `tag`; none if the device answers what nobody asked.
    pub(super) fn remove(&mut self, tag: u64) -> Option<T> {
        let what = self.places.get_mut(tag as usize)?.take()?;
        self.free.push(tag as usize);
        Some(what)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_nothing_comes_twice() {
        let mut table = InFlight::default();
        let (a, b) = (table.insert('a'), table.insert('b'));
        assert_eq!((table.remove(a), table.remove(a), table.len()), (Some('a'), None, 1));
        assert_eq!(table.insert('c'), a);
        assert_eq!((table.remove(b), table.remove(a), table.remove(99)), (Some('b'), Some('c'), None));
        assert_eq!(table.len(), 0);
    }
}
