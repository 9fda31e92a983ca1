//! What guests go through. A story is one script that the host follows with a VM of its own; it tells of
//! several scenarios, because booting takes longer than most of them.

/// A script and its scenarios.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Story {
    pub(super) name: &'static str,
    pub(super) script: &'static str,
    /// In the order in which the script comes to them.
    pub(super) scenarios: &'static [&'static str],
    /// What it depends on: only that is varied.
    varies: Varies,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Varies {
    /// On the kernel, the way and the number of processors.
    All,
    /// On the kernel and the way.
    KernelAndWay,
    /// On the kernel.
    Kernel,
    /// On nothing.
    Nothing,
}

macro_rules! story {
    ($name:literal, $varies:ident, $scenarios:expr) => {
        Story {
            name: $name,
            script: include_str!(concat!("scripts/stories/", $name, ".sh")),
            scenarios: &$scenarios,
            varies: Varies::$varies,
        }
    };
}

/// All of them.
pub(super) const STORIES: [Story; 9] = [
    story!(
        "work",
        All,
        [
            "boot",
            "ext4",
            "fio",
            "hot-plug",
            "hvsock-guest",
            "hvsock-host",
            "hvsock-100",
            "reload",
            "shutdown"
        ]
    ),
    story!(
        "moves",
        All,
        ["fio-moved", "save-idle", "save-paused", "restored-twice", "restore-refused"]
    ),
    story!("moments", All, ["save-booting", "save-opening"]),
    story!("resets", All, ["reboot", "host-reboot", "crash"]),
    story!("killed", All, ["killed"]),
    story!("counts", KernelAndWay, ["counts"]),
    story!("virtio", Kernel, ["virtio-blk"]),
    story!("bad", Nothing, ["bad-command-lines"]),
    story!("hostile", Nothing, ["hostile"]),
];

/// Whether a guest boots at all.
pub(super) const PROBE: Story = story!("probe", Nothing, ["boots"]);

/// Names of the kernels, as the table and the command line have them.
pub(super) const KERNELS: [&str; 2] = ["6.12", "6.1"];
/// Who provides Hyper-V's interfaces.
pub(super) const SYNICS: [&str; 2] = ["kernel", "user"];
/// Numbers of processors.
pub(super) const CPUS: [u32; 2] = [1, 2];

/// One story with one kind of guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Run {
    pub(super) kernel: &'static str,
    pub(super) synic: &'static str,
    pub(super) cpus: u32,
    pub(super) story: &'static Story,
}

impl Run {
    /// The one that shows whether there can be others.
    pub(super) fn probe() -> Self {
        Self { kernel: KERNELS[0], synic: SYNICS[0], cpus: CPUS[0], story: &PROBE }
    }

    /// Kernel, way and processors.
    pub(super) fn kind(&self) -> (&'static str, &'static str, u32) {
        (self.kernel, self.synic, self.cpus)
    }

    /// What the guest is called in the table.
    pub(super) fn guest(&self) -> String {
        let Self { kernel, synic, cpus, .. } = self;
        match self.story.varies {
            Varies::All => format!("{kernel}, {synic}, {cpus} vCPU"),
            Varies::KernelAndWay => format!("{kernel}, {synic}"),
            Varies::Kernel => (*kernel).to_owned(),
            Varies::Nothing => "-".to_owned(),
        }
    }
}

/// Which runs are wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// The whole matrix, not a selection.
    pub(crate) all: bool,
    /// Only stories with one of these scenarios, or of these names.
    pub(crate) only: Vec<String>,
    pub(crate) kernel: Option<String>,
    pub(crate) synic: Option<String>,
    pub(crate) cpus: Option<u32>,
}

impl Wanted {
    /// The runs. A selection has every story once, and every kernel, way and number of processors with
    /// some of them.
    pub(super) fn runs(&self) -> Vec<Run> {
        let narrowed = self.kernel.is_some() || self.synic.is_some() || self.cpus.is_some();
        let mut runs = if self.all || narrowed { self.matrix() } else { selection() };
        runs.retain(|run| {
            self.only.is_empty() || self.only.iter().any(|only| run.story.is_about(only))
        });
        runs
    }

    /// Every story with every kind of guest that is asked for, as far as it depends on that.
    fn matrix(&self) -> Vec<Run> {
        let is =
            |filter: &Option<String>, value: &str| filter.as_deref().is_none_or(|f| f == value);
        let mut runs: Vec<Run> = Vec::new();
        for (kernel, synic, cpus) in kinds() {
            let asked = is(&self.kernel, kernel)
                && is(&self.synic, synic)
                && self.cpus.is_none_or(|asked| asked == cpus);
            if !asked {
                continue;
            }
            for story in &STORIES {
                let run = Run { kernel, synic, cpus, story };
                if !runs.iter().any(|other| other.story == story && other.guest() == run.guest()) {
                    runs.push(run);
                }
            }
        }
        runs
    }
}

impl Story {
    fn is_about(&self, name: &str) -> bool {
        self.name == name || self.scenarios.contains(&name)
    }
}

/// Everything that can be named on the command line: stories and scenarios.
pub(crate) fn names() -> Vec<&'static str> {
    let names =
        STORIES.iter().flat_map(|story| std::iter::once(&story.name).chain(story.scenarios));
    let mut names: Vec<_> = names.copied().collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Each kind of guest, one after the other.
fn kinds() -> Vec<(&'static str, &'static str, u32)> {
    let kinds = KERNELS.iter().flat_map(|kernel| {
        SYNICS.iter().flat_map(move |synic| CPUS.iter().map(move |cpus| (*kernel, *synic, *cpus)))
    });
    kinds.collect()
}

/// Each story once. The kinds of guests go round, so that every story that depends on all has another.
fn selection() -> Vec<Run> {
    let kinds = [
        ("6.12", "kernel", 2),
        ("6.1", "user", 1),
        ("6.12", "user", 2),
        ("6.1", "kernel", 2),
        ("6.12", "kernel", 1),
    ];
    let mut round = kinds.iter().cycle();
    let run = |story: &'static Story| {
        let (kernel, synic, cpus) = match story.varies {
            Varies::All => *round.next()?,
            _ => ("6.12", "kernel", 1),
        };
        Some(Run { kernel, synic, cpus, story })
    };
    STORIES.iter().filter_map(run).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_script_comes_to_its_scenarios() {
        for story in STORIES.iter().chain([&PROBE]) {
            let named = story.script.lines().filter_map(|line| {
                let mut words = line.split_whitespace();
                let verb = words.next()?;
                ["scenario", "check"].contains(&verb).then(|| words.next()).flatten()
            });
            let named: BTreeSet<_> = named.collect();
            assert_eq!(named, story.scenarios.iter().copied().collect(), "{}", story.name);
        }
    }

    #[test]
    fn the_selection_has_every_story_and_every_kind_of_guest() {
        let (some, all) =
            (Wanted::default().runs(), Wanted { all: true, ..Wanted::default() }.runs());
        for story in &STORIES {
            assert_eq!(some.iter().filter(|run| run.story == story).count(), 1, "{}", story.name);
            let kinds = match story.varies {
                Varies::All => 8,
                Varies::KernelAndWay => 4,
                Varies::Kernel => 2,
                Varies::Nothing => 1,
            };
            assert_eq!(
                all.iter().filter(|run| run.story == story).count(),
                kinds,
                "{}",
                story.name
            );
        }
        for run in &all {
            assert!(some.iter().any(|one| one.kernel == run.kernel), "{}", run.kernel);
            assert!(some.iter().any(|one| one.synic == run.synic), "{}", run.synic);
            assert!(some.iter().any(|one| one.cpus == run.cpus), "{}", run.cpus);
        }
    }

    #[test]
    fn filters_narrow_what_is_run() {
        let wanted = |only: &[&str], kernel: Option<&str>, synic: Option<&str>, cpus| {
            let only = only.iter().map(|name| (*name).to_owned()).collect();
            let [kernel, synic] = [kernel, synic].map(|name| name.map(str::to_owned));
            Wanted { all: false, only, kernel, synic, cpus }.runs()
        };
        for (only, kernel, synic, cpus, expected) in [
            (&["killed"][..], None, None, None, 1),
            (&["hvsock-100"], None, None, None, 1),
            (&["ext4", "crash"], None, None, None, 2),
            (&["killed"], Some("6.1"), None, None, 4),
            (&["killed"], Some("6.1"), Some("user"), None, 2),
            (&["killed"], Some("6.1"), Some("user"), Some(2), 1),
            (&["killed"], None, None, Some(3), 0),
            (&["counts"], Some("6.1"), Some("user"), None, 1),
        ] {
            let runs = wanted(only, kernel, synic, cpus);
            assert_eq!(runs.len(), expected, "{only:?} {kernel:?} {synic:?} {cpus:?}");
            assert!(runs.iter().all(|run| kernel.is_none_or(|kernel| kernel == run.kernel)));
        }
    }

    #[test]
    fn names_are_of_one_story_each() {
        let named: usize = STORIES.iter().map(|story| story.scenarios.len()).sum();
        let mut scenarios: Vec<_> = STORIES.iter().flat_map(|story| story.scenarios).collect();
        scenarios.sort_unstable();
        scenarios.dedup();
        assert_eq!(scenarios.len(), named, "a scenario is in two stories");
    }
}
