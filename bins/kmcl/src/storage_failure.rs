//! What an error of the storage client means to the person at the command line.

use vsc_storage::wire::scsi::sense::{AdditionalSense, SenseKey};
use vsc_storage::wire::srb::SrbStatus;
use vsc_storage::{Error, ScsiError};

use crate::exit::{Exit, Failure};
use crate::size::Size;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Scsi(refused) => scsi(&refused),
            Error::ShortTransfer { .. } | Error::BlockSize(_) | Error::ShortData { .. } => {
                Self::disk(error, "check the server and its disk")
            }
            Error::Range { disk_bytes, block_bytes, .. } => Self::usage(
                error,
                format_args!(
                    "the disk ends at {} ({disk_bytes} bytes); use multiples of {block_bytes}",
                    Size(disk_bytes)
                ),
            ),
            Error::TransferTooLong { limit, .. } => {
                Self::usage(error, format_args!("use at most {}", Size(limit.into())))
            }
            Error::Disconnected => {
                Self::peer("the server has closed the connection", "check that it still runs")
            }
            Error::Timeout(_) => Self::peer(
                format_args!("the server is silent: {error}"),
                "check that it runs and is not stopped, or allow more with --timeout",
            ),
            Error::Connect(_) | Error::Refused { .. } => {
                Self::peer(error, "check that the server serves storage")
            }
            Error::Answer(_) | Error::Handshake(_) | Error::Channel(_) => {
                Self::peer(error, "use a server that keeps to the protocol")
            }
            Error::System { .. } | Error::Library(_) | Error::Memory(_) => Self::system(
                error,
                "allow this process more memory and open files (ulimit), or use a lower --depth",
            ),
            _ => Self::new(Exit::System, error, "this should not happen: please report it"),
        }
    }
}

fn scsi(error: &ScsiError) -> Failure {
    let sense = error.sense;
    let code = sense.map(|sense| sense.code);
    let key = sense.map(|sense| sense.key);
    if code == Some(AdditionalSense::SPACE_ALLOCATION_FAILED_WRITE_PROTECT) {
        return Failure::disk(
            format_args!("the server has no space left for the disk: {error}"),
            "free some space on the server's file system",
        );
    }
    if key == Some(SenseKey::DataProtect) {
        return Failure::disk(
            format_args!("the disk is read-only: {error}"),
            "serve it without ro to write to it",
        );
    }
    if error.srb_status.code() == SrbStatus::INVALID_LUN {
        return Failure::disk(
            format_args!("the disk is gone: {error}"),
            "list the server's disks with kmcl disk info",
        );
    }
    let advice = match key {
        Some(SenseKey::MediumError | SenseKey::HardwareError) => {
            "check the image and what it is stored on, on the server's side"
        }
        _ => "see what the server says, with -v there",
    };
    Failure::disk(format_args!("the disk refuses: {error}"), advice)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vsc_storage::wire::scsi::sense::SenseData;
    use vsc_storage::wire::srb::{ScsiAddress, ScsiStatus};

    use super::*;

    #[test]
    fn every_kind_of_error_has_its_exit_code_and_words() {
        let scsi = |key, code| {
            Failure::from(Error::Scsi(ScsiError {
                address: ScsiAddress::default(),
                opcode: 0x2a,
                srb_status: SrbStatus::ERROR,
                scsi_status: ScsiStatus::CHECK_CONDITION,
                sense: Some(SenseData::new(key, code)),
                moved: 0,
            }))
        };
        for (failure, exit, part) in [
            (
                scsi(SenseKey::DataProtect, AdditionalSense::WRITE_PROTECTED),
                Exit::Disk,
                "read-only",
            ),
            (
                scsi(SenseKey::DataProtect, AdditionalSense::SPACE_ALLOCATION_FAILED_WRITE_PROTECT),
                Exit::Disk,
                "no space left",
            ),
            (scsi(SenseKey::MediumError, AdditionalSense::WRITE_ERROR), Exit::Disk, "write error"),
            (Error::Disconnected.into(), Exit::Peer, "closed the connection"),
            (Error::Timeout(Duration::from_secs(3)).into(), Exit::Peer, "3s"),
            (
                Error::Range { offset: 1, bytes: 2, disk_bytes: 1024, block_bytes: 512 }.into(),
                Exit::Usage,
                "1.0 KiB",
            ),
        ] {
            assert_eq!(failure.exit, exit, "{failure}");
            assert!(failure.to_string().contains(part), "{failure}");
        }
    }
}
