//! Who is driven, and who is ready to run: the worker's order of events, without thread or system.

use std::collections::{BTreeMap, VecDeque};

use crate::MAX_TASKS;

/// Names one task for as long as the worker lives; never used twice.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Token(pub(crate) u64);

/// The tasks of a worker. Holds each at most once in the ready queue, so that the queue is bounded by
/// the number of tasks.
#[derive(Debug)]
pub(crate) struct Roster<T> {
    tasks: BTreeMap<Token, Entry<T>>,
    ready: VecDeque<Token>,
    running: Option<Token>,
}

#[derive(Debug)]
struct Entry<T> {
    task: T,
    is_queued: bool,
    rang: bool,
}

/// A task that is to run now.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Started<T> {
    pub(crate) token: Token,
    pub(crate) task: T,
    /// Its descriptor was found readable since it last started.
    pub(crate) rang: bool,
}

impl<T: Clone> Roster<T> {
    pub(crate) fn new() -> Self {
        Self { tasks: BTreeMap::new(), ready: VecDeque::new(), running: None }
    }

    /// Takes `task` in, ready to run. Gives it back where [`MAX_TASKS`] are there already.
    pub(crate) fn insert(&mut self, token: Token, task: T) -> Result<(), T> {
        if self.tasks.len() >= MAX_TASKS {
            return Err(task);
        }
        self.tasks.insert(token, Entry { task, is_queued: false, rang: false });
        self.mark_ready(token);
        Ok(())
    }

    /// Lets go of a task; `None` if it is not here. It may still be [running](Self::is_running).
    pub(crate) fn remove(&mut self, token: Token) -> Option<T> {
        let entry = self.tasks.remove(&token)?;
        if entry.is_queued {
            self.ready.retain(|queued| *queued != token);
        }
        Some(entry.task)
    }

    /// Lets go of the task with the lowest token.
    pub(crate) fn remove_first(&mut self) -> Option<T> {
        let token = *self.tasks.keys().next()?;
        self.remove(token)
    }

    /// The first task that is as `wanted`.
    pub(crate) fn find(&self, wanted: impl Fn(&T) -> bool) -> Option<Token> {
        self.tasks.iter().find(|(_, entry)| wanted(&entry.task)).map(|(token, _)| *token)
    }

    /// Puts a task at the end of the ready queue, unless it is in it. Unknown tokens are ignored: a
    /// wake-up or a doorbell may come after the removal.
    pub(crate) fn mark_ready(&mut self, token: Token) {
        if let Some(entry) = self.tasks.get_mut(&token)
            && !entry.is_queued
        {
            entry.is_queued = true;
            self.ready.push_back(token);
        }
    }

    /// Puts a task into the ready queue because its descriptor was found readable.
    pub(crate) fn mark_rung(&mut self, token: Token) {
        if let Some(entry) = self.tasks.get_mut(&token) {
            entry.rang = true;
            self.mark_ready(token);
        }
    }

    /// How many tasks are ready.
    pub(crate) fn ready_count(&self) -> usize {
        self.ready.len()
    }

    /// Takes the first task off the ready queue: it is running until [`Self::finish`].
    pub(crate) fn start_next(&mut self) -> Option<Started<T>> {
        let token = self.ready.pop_front()?;
        let entry = self.tasks.get_mut(&token)?;
        entry.is_queued = false;
        self.running = Some(token);
        let rang = std::mem::take(&mut entry.rang);
        Some(Started { token, task: entry.task.clone(), rang })
    }

    /// The running task has returned, and has `more` to do.
    pub(crate) fn finish(&mut self, more: bool) {
        if let Some(token) = self.running.take()
            && more
        {
            self.mark_ready(token);
        }
    }

    /// Whether a task is between [`Self::start_next`] and [`Self::finish`].
    pub(crate) fn is_running(&self, token: Token) -> bool {
        self.running == Some(token)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn roster(tasks: u64) -> Roster<u64> {
        let mut roster = Roster::new();
        for task in 0..tasks {
            roster.insert(Token(task), task).unwrap();
        }
        roster
    }

    /// Runs one turn as the worker does; `more` says which tasks have more to do.
    fn turn(roster: &mut Roster<u64>, more: impl Fn(u64) -> bool) -> Vec<u64> {
        let mut ran = Vec::new();
        for _ in 0..roster.ready_count() {
            let task = roster.start_next().unwrap().task;
            ran.push(task);
            roster.finish(more(task));
        }
        ran
    }

    #[test]
    fn a_task_with_more_to_do_goes_behind_the_others() {
        let mut roster = roster(3);
        assert_eq!(turn(&mut roster, |task| task == 0), [0, 1, 2]);
        roster.mark_ready(Token(2));
        assert_eq!(turn(&mut roster, |task| task == 0), [0, 2]);
        assert_eq!(turn(&mut roster, |_| false), [0]);
        assert_eq!(roster.ready_count(), 0);
    }

    #[test]
    fn a_wake_up_while_running_runs_the_task_again() {
        let mut roster = roster(1);
        assert!(roster.start_next().is_some());
        roster.mark_ready(Token(0));
        roster.finish(false);
        assert_eq!(turn(&mut roster, |_| false), [0]);
    }

    #[test]
    fn a_ring_is_told_to_the_next_start_and_to_no_other() {
        let mut roster = roster(1);
        for (rings, expected) in [(0, false), (2, true), (0, false), (1, true)] {
            roster.mark_ready(Token(0));
            for _ in 0..rings {
                roster.mark_rung(Token(0));
            }
            assert_eq!(roster.start_next().unwrap().rang, expected, "{rings} rings");
            roster.finish(false);
        }
        roster.mark_rung(Token(0));
        assert!(roster.start_next().unwrap().rang, "a ring alone makes it ready");
    }

    #[test]
    fn a_removed_task_never_starts_again() {
        let mut roster = roster(2);
        assert_eq!(roster.start_next().unwrap().token, Token(0));
        assert_eq!(roster.remove(Token(0)), Some(0));
        assert!(roster.is_running(Token(0)));
        roster.mark_ready(Token(0));
        roster.finish(true);
        assert!(!roster.is_running(Token(0)));
        assert_eq!(roster.remove(Token(1)), Some(1));
        assert_eq!(roster.start_next(), None);
        assert_eq!(roster.remove(Token(1)), None);
    }

    #[test]
    fn the_roster_is_bounded() {
        let mut roster = roster(MAX_TASKS as u64);
        assert_eq!(roster.insert(Token(u64::MAX), 7), Err(7));
        roster.remove_first();
        assert_eq!(roster.insert(Token(u64::MAX), 7), Ok(()));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Wake(u64),
        Run { more: bool },
        Remove(u64),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u64..6).prop_map(Step::Wake),
            4 => any::<bool>().prop_map(|more| Step::Run { more }),
            1 => (0u64..6).prop_map(Step::Remove),
        ]
    }

    proptest! {
        /// Every wake-up of a task that stays is followed by a start of it, and before that no other
        /// task starts twice.
        #[test]
        fn every_wake_up_is_answered_and_nobody_overtakes_twice(
            steps in proptest::collection::vec(any_step(), 0..200),
        ) {
            let mut roster = roster(6);
            // For each task that is owed a start: how often each other one started since.
            let mut owed: HashMap<u64, HashMap<u64, u32>> =
                (0..6).map(|task| (task, HashMap::new())).collect();
            for step in steps {
                match step {
                    Step::Wake(task) => {
                        roster.mark_ready(Token(task));
                        if roster.find(|known| *known == task).is_some() {
                            owed.entry(task).or_default();
                        }
                    }
                    Step::Remove(task) => {
                        roster.remove(Token(task));
                        owed.remove(&task);
                    }
                    Step::Run { more } => {
                        let Some(Started { task, .. }) = roster.start_next() else {
                            prop_assert!(owed.is_empty(), "owed and not ready: {owed:?}");
                            continue;
                        };
                        prop_assert!(owed.remove(&task).is_some(), "{task} ran for nothing");
                        for starts in owed.values_mut() {
                            let count = starts.entry(task).or_default();
                            *count += 1;
                            prop_assert!(*count <= 1, "{task} overtook twice");
                        }
                        roster.finish(more);
                        if more {
                            owed.entry(task).or_default();
                        }
                    }
                }
                prop_assert_eq!(roster.ready_count(), owed.len());
            }
        }
    }
}
