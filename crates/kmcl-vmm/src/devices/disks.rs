//! The disks of a VM: which image has which name, and which address.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vsp_storage::block::{CacheMode, Engine, FileOptions, ImageError, open_file};
use vsp_storage::{Disk, DiskError, DiskOptions, ScsiAddress};

use crate::config::{
    Cache, DiskConfig, MAX_CONTROLLERS, MAX_DISKS, MAX_DISKS_PER_CONTROLLER, MAX_ID_BYTES,
};

/// Why a VM cannot have a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskConfigError {
    /// The image cannot be had. The message names it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is no disk.
    #[error("{path}: {source}")]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why.
        source: DiskError,
    },
    /// Its name is none that a disk can have.
    #[error(
        "\"{id}\" cannot be a disk's name: give 1 to {MAX_ID_BYTES} letters, digits, -, _ and ."
    )]
    Id {
        /// The name.
        id: String,
    },
    /// Another disk has the name.
    #[error("there is a disk \"{id}\" already")]
    IdTaken {
        /// The name.
        id: String,
    },
    /// There is no such disk.
    #[error("there is no disk \"{id}\"")]
    NoSuchDisk {
        /// The name asked for.
        id: String,
    },
    /// There is no such controller.
    #[error("there is no controller {controller}, of {count}")]
    NoController {
        /// Its number.
        controller: u8,
        /// How many there are.
        count: u8,
    },
    /// The number of controllers is out of range.
    #[error("{count} storage controllers: give 1 to {MAX_CONTROLLERS}")]
    Controllers {
        /// What was asked for.
        count: u8,
    },
    /// Another disk is there.
    #[error("LUN {lun} of controller {controller} is taken by \"{by}\"")]
    LunTaken {
        /// The controller.
        controller: u8,
        /// The LUN.
        lun: u8,
        /// Who has it.
        by: String,
    },
    /// No such LUN, or none left.
    #[error("controller {controller} has LUNs 0 to {most}, and no other is free", most = MAX_DISKS_PER_CONTROLLER - 1)]
    NoLun {
        /// The controller.
        controller: u8,
    },
    /// Too many disks.
    #[error("more than {MAX_DISKS} disks")]
    TooMany,
    /// The image cannot be flushed.
    #[error("cannot flush {path}: {source}")]
    Flush {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A disk's name, and where its guest finds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Place {
    pub(crate) id: String,
    pub(crate) controller: u8,
    pub(crate) lun: u8,
}

impl Place {
    pub(crate) fn address(&self) -> ScsiAddress {
        ScsiAddress::new(0, 0, self.lun)
    }
}

/// An image that is open and locked.
pub(crate) struct OpenDisk {
    /// As it was asked for, with its place filled in and its path absolute.
    pub(crate) config: DiskConfig,
    pub(crate) place: Place,
    pub(crate) disk: Arc<Disk>,
}

/// Every disk of a VM, in the order in which they came.
pub(crate) struct Disks {
    disks: Vec<OpenDisk>,
    controllers: u8,
}

impl Disks {
    /// Opens the images in `configs`.
    ///
    /// # Errors
    /// [`DiskConfigError`].
    pub(crate) fn open(configs: &[DiskConfig], controllers: u8) -> Result<Self, DiskConfigError> {
        if !(1..=MAX_CONTROLLERS).contains(&controllers) {
            return Err(DiskConfigError::Controllers { count: controllers });
        }
        let mut disks = Self { disks: Vec::new(), controllers };
        for config in configs {
            let disk = disks.prepare(config)?;
            disks.add(disk);
        }
        Ok(disks)
    }

    /// Opens the images in `configs`, as far as they are there: each one that is not adds a line to
    /// `missing`.
    ///
    /// # Errors
    /// [`DiskConfigError::Controllers`].
    pub(crate) fn open_all(
        configs: &[DiskConfig],
        controllers: u8,
        missing: &mut Vec<String>,
    ) -> Result<Self, DiskConfigError> {
        let mut disks = Self::open(&[], controllers)?;
        for config in configs {
            match disks.prepare(config) {
                Ok(disk) => disks.add(disk),
                Err(error) => {
                    missing.push(format!("disk {}: {error}", config.id.as_deref().unwrap_or("?")));
                }
            }
        }
        Ok(disks)
    }

    /// Opens one more image, and finds it a place. It is not among the disks yet.
    ///
    /// # Errors
    /// [`DiskConfigError`].
    pub(crate) fn prepare(&self, config: &DiskConfig) -> Result<OpenDisk, DiskConfigError> {
        let taken: Vec<&Place> = self.disks.iter().map(|disk| &disk.place).collect();
        let place = place(&taken, config, self.controllers)?;
        let path = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
        let cache = match config.cache {
            Cache::Buffered => CacheMode::Buffered,
            Cache::Direct => CacheMode::Direct,
        };
        let read_only = config.read_only;
        let options = FileOptions { read_only, cache, engine: Engine::Auto, sector_bytes: 512 };
        let image = open_file(&path, &options)?;
        let disk = Disk::new(image, &DiskOptions::new(place.id.clone()));
        let disk = disk.map_err(|source| DiskConfigError::Disk { path: path.clone(), source })?;
        let config = DiskConfig {
            id: Some(place.id.clone()),
            path,
            controller: place.controller,
            lun: Some(place.lun),
            ..config.clone()
        };
        Ok(OpenDisk { config, place, disk })
    }

    pub(crate) fn add(&mut self, disk: OpenDisk) {
        self.disks.push(disk);
    }

    /// The disk of this name.
    ///
    /// # Errors
    /// [`DiskConfigError::NoSuchDisk`].
    pub(crate) fn find(&self, id: &str) -> Result<&OpenDisk, DiskConfigError> {
        let found = self.disks.iter().find(|disk| disk.place.id == id);
        found.ok_or_else(|| DiskConfigError::NoSuchDisk { id: id.to_owned() })
    }

    /// Takes the disk of this name out; its image is closed when its last request has ended.
    pub(crate) fn remove(&mut self, id: &str) {
        self.disks.retain(|disk| disk.place.id != id);
    }

    /// Closes all images.
    pub(crate) fn clear(&mut self) {
        self.disks.clear();
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &OpenDisk> {
        self.disks.iter()
    }

    /// How many controllers there are.
    pub(crate) fn controllers(&self) -> u8 {
        self.controllers
    }

    /// Brings to the medium what a guest has written, flushed or not.
    ///
    /// # Errors
    /// [`DiskConfigError::Flush`].
    pub(crate) fn flush(&self) -> Result<(), DiskConfigError> {
        self.disks.iter().filter(|disk| !disk.config.read_only).try_for_each(|disk| {
            let path: &Path = &disk.config.path;
            let synced = File::open(path).and_then(|file| file.sync_all());
            synced.map_err(|source| DiskConfigError::Flush { path: path.to_owned(), source })
        })
    }
}

/// Where a disk goes: where it asks to be, if that is free; else where there is room.
fn place(taken: &[&Place], config: &DiskConfig, count: u8) -> Result<Place, DiskConfigError> {
    if taken.len() >= MAX_DISKS {
        return Err(DiskConfigError::TooMany);
    }
    let controller = config.controller;
    if controller >= count {
        return Err(DiskConfigError::NoController { controller, count });
    }
    let has = |id: &str| taken.iter().any(|place| place.id == id);
    let id = match &config.id {
        Some(id) if !is_id(id) => return Err(DiskConfigError::Id { id: id.clone() }),
        Some(id) if has(id) => return Err(DiskConfigError::IdTaken { id: id.clone() }),
        Some(id) => id.clone(),
        None => {
            let mut names = (0..=MAX_DISKS).map(|number| format!("disk{number}"));
            names.find(|id| !has(id)).ok_or(DiskConfigError::TooMany)?
        }
    };
    let at = |lun| taken.iter().find(|place| (place.controller, place.lun) == (controller, lun));
    let luns = 0..u8::try_from(MAX_DISKS_PER_CONTROLLER).unwrap_or(u8::MAX);
    let lun = match config.lun {
        Some(lun) if !luns.contains(&lun) => return Err(DiskConfigError::NoLun { controller }),
        Some(lun) => match at(lun) {
            Some(by) => {
                let by = by.id.clone();
                return Err(DiskConfigError::LunTaken { controller, lun, by });
            }
            None => lun,
        },
        None => {
            let mut free = luns.filter(|lun| at(*lun).is_none());
            free.next().ok_or(DiskConfigError::NoLun { controller })?
        }
    };
    Ok(Place { id, controller, lun })
}

fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(id: Option<&str>, controller: u8, lun: Option<u8>) -> DiskConfig {
        DiskConfig {
            id: id.map(str::to_owned),
            path: PathBuf::from("unused"),
            read_only: false,
            cache: Cache::Buffered,
            controller,
            lun,
        }
    }

    #[test]
    fn every_disk_has_a_place_of_its_own() {
        let there = [
            Place { id: "root".into(), controller: 0, lun: 0 },
            Place { id: "disk0".into(), controller: 1, lun: 1 },
        ];
        let there: Vec<&Place> = there.iter().collect();
        let long = "x".repeat(MAX_ID_BYTES + 1);
        for (wish, expected) in [
            (wish(None, 0, None), "disk1 at 0.1"),
            (wish(None, 1, None), "disk1 at 1.0"),
            (wish(Some("data"), 1, Some(63)), "data at 1.63"),
            (wish(Some("root"), 0, None), "there is a disk \"root\" already"),
            (wish(Some("a b"), 0, None), "\"a b\" cannot be a disk's name"),
            (wish(Some(""), 0, None), "\"\" cannot be a disk's name"),
            (wish(Some(&long), 0, None), "cannot be a disk's name"),
            (wish(None, 2, None), "there is no controller 2, of 2"),
            (wish(None, 1, Some(1)), "LUN 1 of controller 1 is taken by \"disk0\""),
            (wish(None, 0, Some(64)), "controller 0 has LUNs 0 to 63"),
        ] {
            let found = match place(&there, &wish, 2) {
                Ok(Place { id, controller, lun }) => format!("{id} at {controller}.{lun}"),
                Err(error) => error.to_string(),
            };
            assert!(found.contains(expected), "{wish:?}: {found}");
        }
    }

    #[test]
    fn a_controller_can_be_full() {
        let place = |lun| Place { id: format!("d{lun}"), controller: 0, lun };
        let all: Vec<Place> = (0..64).map(place).collect();
        let all: Vec<&Place> = all.iter().collect();
        let error = super::place(&all, &wish(None, 0, None), 2).unwrap_err();
        assert!(matches!(error, DiskConfigError::NoLun { controller: 0 }), "{error}");
        assert_eq!(super::place(&all, &wish(None, 1, None), 2).unwrap().lun, 0);
    }
}
