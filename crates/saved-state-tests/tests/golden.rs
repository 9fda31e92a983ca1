//! Every state under `tests/golden/` is restored, for ever, by every later version of this project.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at its first surprise"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use saved_state::inspect::{ALL_KINDS, inspect_file};
use saved_state_tests::golden::{Golden, STATES};

/// The folder of the states of the first version of the format.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/v1")
}

fn path_of(golden: &Golden) -> PathBuf {
    folder().join(format!("{}.state", golden.name))
}

fn kept(golden: &Golden) -> Vec<u8> {
    let path = path_of(golden);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_state_that_was_ever_kept_is_restored() {
    assert!(STATES.len() >= 12);
    for golden in STATES {
        eprintln!("{}", golden.name);
        (golden.restore)(&kept(golden));
    }
}

#[test]
fn nothing_is_wrong_with_any_of_them() {
    for golden in STATES {
        let state = kept(golden);
        for piece in inspect_file(&state, ALL_KINDS) {
            assert!(piece.piece.damage.is_none(), "{}: {:?}", golden.name, piece.piece);
            assert!(piece.misplaced.is_none(), "{}: {:?}", golden.name, piece.misplaced);
        }
    }
}

/// What is made today can be restored today, too: before it is kept, and when the code has changed.
#[test]
fn every_state_can_be_made_and_restored() {
    for golden in STATES {
        let Some(make) = golden.make else { continue };
        eprintln!("{}", golden.name);
        (golden.restore)(&make());
    }
}

#[test]
fn every_file_has_a_row_and_every_row_a_file() {
    let files: BTreeSet<_> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "state"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let rows: BTreeSet<_> = STATES.iter().map(|golden| golden.name.to_owned()).collect();
    assert_eq!(files, rows, "a file that nobody restores, or a state that is not kept");
    let list = fs::read_to_string(folder().join("README.md")).unwrap();
    for golden in STATES {
        let row = format!("| `{}` | {} |", golden.name, golden.about);
        assert!(list.contains(&row), "not in the list: {row}");
    }
}

/// Makes the states that are not kept yet. None that is there is ever written again.
#[test]
#[ignore = "writes files: for a new state, or a new version of the format"]
fn make_what_is_missing() {
    for golden in STATES {
        let path = path_of(golden);
        if !path.exists()
            && let Some(make) = golden.make
        {
            fs::write(&path, make()).unwrap();
            println!("| `{}` | {} |", golden.name, golden.about);
        }
    }
}
