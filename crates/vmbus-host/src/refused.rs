//! Saying what a guest did wrong, without letting it fill the log.

/// Lets through the first event, and then each whose number is a power of two.
#[derive(Debug, Default)]
pub(crate) struct LogGate {
    events: u64,
}

impl LogGate {
    /// Counts an event. Its number, if it is to be logged.
    pub(crate) fn count(&mut self) -> Option<u64> {
        self.events = self.events.saturating_add(1);
        self.events.is_power_of_two().then_some(self.events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_events_are_twenty_lines() {
        let mut gate = LogGate::default();
        let logged: Vec<u64> = (0..1_000_000).filter_map(|_| gate.count()).collect();
        assert_eq!(logged.len(), 20);
        assert_eq!(logged[..4], [1, 2, 4, 8]);
    }
}
