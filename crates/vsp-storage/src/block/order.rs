//! Which request may start when.
//!
//! Two rules hold requests back:
//!
//! 1. A flush starts when every write that was submitted before it has finished. Later requests do
//!    not wait for it.
//! 2. On a disk that is written both past the page cache and through it, the two kinds of write
//!    exclude each other. A write through the cache first reads the rest of its page; a direct write
//!    to another sector of that page, under way at the same time, would be undone when the page is
//!    written back. Held writes start in order, so neither kind starves.
//!
//! Reads and the writes that the file system orders itself (punching holes) are never held.

use std::collections::VecDeque;

/// What a request is, to the rules.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Class {
    /// Changes nothing.
    Read,
    /// Changes the medium.
    Write(Sharing),
    /// Makes earlier writes stable.
    Flush,
}

/// What a write excludes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sharing {
    /// Nothing.
    Any,
    /// Writes through the page cache.
    Direct,
    /// Writes past the page cache.
    Buffered,
}

/// The place of a started request; given back when it has finished.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Ticket {
    class: Class,
    /// Number of flushes submitted before it, for writes.
    epoch: u64,
}

/// Holds requests `T` until they may start.
#[derive(Debug)]
pub(super) struct Order<T> {
    /// Number of the first of `epochs`.
    first_epoch: u64,
    /// Never empty. All but the last are closed by a flush that waits for them.
    epochs: VecDeque<Epoch<T>>,
    direct: usize,
    buffered: usize,
    held: VecDeque<(T, Ticket)>,
}

#[derive(Debug)]
struct Epoch<T> {
    /// Writes that have not finished.
    writes: usize,
    /// Waits for the writes of this and all earlier epochs.
    flush: Option<T>,
}

impl<T> Order<T> {
    pub(super) fn new() -> Self {
        let mut epochs = VecDeque::with_capacity(8);
        epochs.push_back(Epoch { writes: 0, flush: None });
        Self { first_epoch: 0, epochs, direct: 0, buffered: 0, held: VecDeque::new() }
    }

    /// Takes a request, and adds what may start to `ready`.
    pub(super) fn admit(&mut self, item: T, class: Class, ready: &mut Vec<(T, Ticket)>) {
        let epoch = self.first_epoch + self.epochs.len() as u64 - 1;
        let ticket = Ticket { class, epoch };
        match class {
            Class::Read => ready.push((item, ticket)),
            Class::Write(_) => {
                if let Some(open) = self.epochs.back_mut() {
                    open.writes += 1;
                }
                self.start_or_hold(item, ticket, ready);
            }
            Class::Flush => match self.epochs.back_mut() {
                Some(open) if self.first_epoch != epoch || open.writes > 0 => {
                    open.flush = Some(item);
                    self.epochs.push_back(Epoch { writes: 0, flush: None });
                }
                _ => ready.push((item, ticket)),
            },
        }
    }

    /// A started write turns out to be of another kind; it starts again under the rules for that,
    /// and flushes go on waiting for it.
    pub(super) fn readmit(
        &mut self,
        item: T,
        ticket: Ticket,
        sharing: Sharing,
        ready: &mut Vec<(T, Ticket)>,
    ) {
        self.release(ticket);
        let ticket = Ticket { class: Class::Write(sharing), ..ticket };
        self.start_or_hold(item, ticket, ready);
        self.start_held(ready);
    }

    /// A started request has finished; what may start now is added to `ready`.
    pub(super) fn finish(&mut self, ticket: Ticket, ready: &mut Vec<(T, Ticket)>) {
        let Class::Write(_) = ticket.class else {
            return;
        };
        self.release(ticket);
        self.forget_write(ticket);
        self.start_flushes(ready);
        self.start_held(ready);
    }

    /// No flush waits for this write any more.
    fn forget_write(&mut self, ticket: Ticket) {
        let index = usize::try_from(ticket.epoch.wrapping_sub(self.first_epoch)).ok();
        if let Some(epoch) = index.and_then(|index| self.epochs.get_mut(index)) {
            epoch.writes = epoch.writes.saturating_sub(1);
        }
    }

    fn start_flushes(&mut self, ready: &mut Vec<(T, Ticket)>) {
        while self.epochs.len() > 1 && self.epochs.front().is_some_and(|front| front.writes == 0) {
            self.first_epoch += 1;
            if let Some(flush) = self.epochs.pop_front().and_then(|front| front.flush) {
                ready.push((flush, Ticket { class: Class::Flush, epoch: self.first_epoch }));
            }
        }
    }

    /// Takes the held requests that `wanted` names out, in order, as if they had never come. What may
    /// start now is added to `ready`.
    pub(super) fn withdraw(
        &mut self,
        wanted: impl Fn(&T) -> bool,
        withdrawn: &mut Vec<T>,
        ready: &mut Vec<(T, Ticket)>,
    ) {
        // An epoch whose flush has gone stays closed: the next flush waits for it all the same.
        for epoch in &mut self.epochs {
            withdrawn.extend(epoch.flush.take_if(|flush| wanted(flush)));
        }
        for (item, ticket) in std::mem::take(&mut self.held) {
            if wanted(&item) {
                withdrawn.push(item);
                self.forget_write(ticket);
            } else {
                self.held.push_back((item, ticket));
            }
        }
        self.start_flushes(ready);
        self.start_held(ready);
    }

    /// How many requests are held.
    #[cfg(test)]
    fn held(&self) -> usize {
        self.held.len() + self.epochs.iter().filter(|epoch| epoch.flush.is_some()).count()
    }

    fn release(&mut self, ticket: Ticket) {
        match ticket.class {
            Class::Write(Sharing::Direct) => self.direct -= 1,
            Class::Write(Sharing::Buffered) => self.buffered -= 1,
            _ => {}
        }
    }

    fn start_or_hold(&mut self, item: T, ticket: Ticket, ready: &mut Vec<(T, Ticket)>) {
        if ticket.class == Class::Write(Sharing::Any) {
            ready.push((item, ticket));
        } else if self.held.is_empty() && self.may_start(ticket) {
            self.start(item, ticket, ready);
        } else {
            self.held.push_back((item, ticket));
        }
    }

    fn start_held(&mut self, ready: &mut Vec<(T, Ticket)>) {
        while self.held.front().is_some_and(|(_, ticket)| self.may_start(*ticket)) {
            if let Some((item, ticket)) = self.held.pop_front() {
                self.start(item, ticket, ready);
            }
        }
    }

    fn may_start(&self, ticket: Ticket) -> bool {
        match ticket.class {
            Class::Write(Sharing::Direct) => self.buffered == 0,
            Class::Write(Sharing::Buffered) => self.direct == 0,
            _ => true,
        }
    }

    fn start(&mut self, item: T, ticket: Ticket, ready: &mut Vec<(T, Ticket)>) {
        match ticket.class {
            Class::Write(Sharing::Direct) => self.direct += 1,
            Class::Write(Sharing::Buffered) => self.buffered += 1,
            _ => {}
        }
        ready.push((item, ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIRECT: Class = Class::Write(Sharing::Direct);
    const BUFFERED: Class = Class::Write(Sharing::Buffered);
    const ANY: Class = Class::Write(Sharing::Any);

    fn names(ready: &[(&'static str, Ticket)]) -> Vec<&'static str> {
        ready.iter().map(|(name, _)| *name).collect()
    }

    /// Admits and finishes in the order of the script; prints the row that starts something else.
    fn run(script: &[(&str, Option<Class>, &[&'static str])]) {
        let mut order = Order::new();
        let mut started: Vec<(&'static str, Ticket)> = Vec::new();
        for &(name, class, expected) in script {
            let mut ready = Vec::new();
            let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
            match class {
                Some(class) => order.admit(name, class, &mut ready),
                None => {
                    let at = started.iter().position(|(other, _)| *other == name).unwrap();
                    order.finish(started.remove(at).1, &mut ready);
                }
            }
            assert_eq!(names(&ready), expected, "after {name} {class:?}");
            started.extend(ready);
        }
        assert_eq!(order.held(), 0);
    }

    #[test]
    fn a_flush_waits_for_earlier_writes_and_for_nothing_else() {
        run(&[
            ("flush0", Some(Class::Flush), &["flush0"]),
            ("write1", Some(ANY), &["write1"]),
            ("write2", Some(DIRECT), &["write2"]),
            ("flush1", Some(Class::Flush), &[]),
            ("read", Some(Class::Read), &["read"]),
            ("write3", Some(ANY), &["write3"]),
            ("flush2", Some(Class::Flush), &[]),
            ("flush3", Some(Class::Flush), &[]),
            ("flush0", None, &[]),
            ("write3", None, &[]),
            ("write2", None, &[]),
            ("read", None, &[]),
            ("write1", None, &["flush1", "flush2", "flush3"]),
            ("flush4", Some(Class::Flush), &["flush4"]),
        ]);
    }

    #[test]
    fn direct_and_buffered_writes_exclude_each_other_in_order() {
        run(&[
            ("direct1", Some(DIRECT), &["direct1"]),
            ("direct2", Some(DIRECT), &["direct2"]),
            ("buffered1", Some(BUFFERED), &[]),
            ("direct3", Some(DIRECT), &[]),
            ("hole", Some(ANY), &["hole"]),
            ("flush", Some(Class::Flush), &[]),
            ("direct1", None, &[]),
            ("direct2", None, &["buffered1"]),
            ("hole", None, &[]),
            ("buffered1", None, &["direct3"]),
            ("direct3", None, &["flush"]),
        ]);
    }

    #[test]
    fn a_write_that_changes_its_kind_is_still_waited_for() {
        let (mut order, mut ready) = (Order::new(), Vec::new());
        order.admit("a", DIRECT, &mut ready);
        order.admit("b", DIRECT, &mut ready);
        let (_, a) = ready[0];
        let (_, b) = ready[1];
        ready.clear();
        order.admit("flush", Class::Flush, &mut ready);
        order.readmit("a", a, Sharing::Buffered, &mut ready);
        assert_eq!(names(&ready), [""; 0], "b is still being written past the cache");
        order.finish(b, &mut ready);
        assert_eq!(names(&ready), ["a"]);
        let (_, a) = ready[0];
        ready.clear();
        order.finish(a, &mut ready);
        assert_eq!(names(&ready), ["flush"]);
    }

    #[test]
    fn what_is_withdrawn_holds_nothing_back() {
        let (mut order, mut ready, mut gone) = (Order::new(), Vec::new(), Vec::new());
        order.admit("direct", DIRECT, &mut ready);
        order.admit("buffered", BUFFERED, &mut ready);
        order.admit("flush1", Class::Flush, &mut ready);
        order.admit("write", ANY, &mut ready);
        order.admit("flush2", Class::Flush, &mut ready);
        assert_eq!(names(&ready), ["direct", "write"]);
        let (direct, write) = (ready[0].1, ready[1].1);
        ready.clear();
        order.withdraw(|name| matches!(*name, "buffered" | "flush1"), &mut gone, &mut ready);
        assert_eq!((gone.as_slice(), names(&ready)), (&["flush1", "buffered"][..], vec![]));
        order.finish(write, &mut ready);
        assert_eq!(names(&ready), [""; 0], "the second flush still waits for the direct write");
        order.finish(direct, &mut ready);
        assert_eq!(names(&ready), ["flush2"]);
        assert_eq!(order.held(), 0);
        // With all it waited for withdrawn, a flush starts.
        let (mut order, mut ready, mut gone) = (Order::new(), Vec::new(), Vec::new());
        order.admit("direct", DIRECT, &mut ready);
        order.admit("buffered", BUFFERED, &mut ready);
        order.finish(ready.pop().unwrap().1, &mut ready); // starts "buffered"
        order.admit("direct2", DIRECT, &mut ready);
        order.admit("flush", Class::Flush, &mut ready);
        let (_, buffered) = ready.pop().unwrap();
        order.finish(buffered, &mut ready);
        order.withdraw(|name| *name == "flush", &mut gone, &mut ready);
        assert_eq!((gone.as_slice(), names(&ready)), (&["flush"][..], vec!["direct2"]));
    }

    proptest! {
        /// Whatever comes and in whatever order it finishes or is withdrawn: everything else starts
        /// once, no flush starts before an earlier write has gone, and the two kinds of write never
        /// run together.
        #[test]
        fn the_rules_hold(
            script in proptest::collection::vec((0u8..6, any::<u16>()), 1..60),
        ) {
            let mut order = Order::new();
            let mut classes = Vec::new();
            let mut running: Vec<(usize, Ticket)> = Vec::new();
            let mut finished = std::collections::HashSet::new();
            let mut left = 0;
            let mut steps = script.into_iter();
            loop {
                let mut ready = Vec::new();
                match steps.next() {
                    Some((kind @ 0..4, _)) => {
                        let class = [Class::Read, DIRECT, BUFFERED, Class::Flush][usize::from(kind)];
                        order.admit(classes.len(), class, &mut ready);
                        classes.push(class);
                    }
                    Some((4, which)) if !running.is_empty() => {
                        let (id, ticket) = running.remove(usize::from(which) % running.len());
                        finished.insert(id);
                        order.finish(ticket, &mut ready);
                    }
                    Some((5, which)) => {
                        let mut gone = Vec::new();
                        let wanted = |id: &usize| id % 3 == usize::from(which % 3);
                        order.withdraw(wanted, &mut gone, &mut ready);
                        prop_assert!(gone.iter().all(wanted));
                        left += gone.len();
                        finished.extend(gone);
                    }
                    Some(_) => {}
                    None => match running.pop() {
                        Some((id, ticket)) => {
                            finished.insert(id);
                            order.finish(ticket, &mut ready);
                        }
                        None => break,
                    },
                }
                for (id, ticket) in ready {
                    left += 1;
                    if classes[id] == Class::Flush {
                        let earlier = (0..id).filter(|&i| matches!(classes[i], Class::Write(_)));
                        prop_assert!(earlier.into_iter().all(|i| finished.contains(&i)), "flush {id}");
                    }
                    running.push((id, ticket));
                }
                let runs = |class| running.iter().any(|&(id, _)| classes[id] == class);
                prop_assert!(!(runs(DIRECT) && runs(BUFFERED)));
            }
            prop_assert_eq!(left, classes.len());
            prop_assert_eq!(order.held(), 0);
        }
    }
}
