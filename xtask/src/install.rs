//! `cargo xtask install`: the C interface as a system has it: headers, a shared library with a versioned
//! name, a static one, and a pkg-config file.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::run::{Failure, run, say};
use crate::workspace::Workspace;

const HEADERS: [&str; 3] = ["kmcl.h", "kmcl_wdm.h", "vmbuskernelmodeclientlibapi.h"];

/// Installs below `prefix`: from `libraries`, or from a release build made for it.
pub(crate) fn install(
    workspace: &Workspace,
    prefix: &Path,
    libraries: Option<&Path>,
) -> Result<(), Failure> {
    let libraries = match libraries {
        Some(folder) => folder.to_path_buf(),
        None => {
            run(&mut workspace.cargo(["build", "--release", "--package", "kmcl-capi"]))?;
            workspace.target_directory().join("release")
        }
    };
    let prefix = std::path::absolute(prefix)
        .map_err(|source| Failure::File { path: prefix.to_path_buf(), source })?;
    let version = workspace
        .packages()
        .iter()
        .find(|package| package.name.as_str() == "kmcl-capi")
        .map(|package| package.version.to_string())
        .unwrap_or_default();

    let include = folder(prefix.join("include/kmcl"))?;
    for header in HEADERS {
        let from = workspace.root().join("crates/kmcl-capi/include").join(header);
        copy(&from, &include.join(header))?;
    }
    let lib = folder(prefix.join("lib"))?;
    let names = names(&version);
    copy(&libraries.join("libkmcl_capi.so"), &lib.join(&names.file))?;
    link(&names.file, &lib.join(&names.soname))?;
    link(&names.soname, &lib.join("libkmcl.so"))?;
    copy(&libraries.join("libkmcl_capi.a"), &lib.join("libkmcl.a"))?;
    let pkgconfig = folder(lib.join("pkgconfig"))?.join("kmcl.pc");
    std::fs::write(&pkgconfig, pkg_config(&prefix, &version))
        .map_err(|source| Failure::File { path: pkgconfig, source })?;
    say(&format!("kmcl {version} is installed below {}", prefix.display()));
    Ok(())
}

/// The file of a shared library, and the name that programs look for.
#[derive(Debug, Eq, PartialEq)]
struct Names {
    file: String,
    soname: String,
}

/// Before 1.0 every minor version may change the binary interface; `build.rs` of the library says the same.
fn names(version: &str) -> Names {
    let mut parts = version.split('.');
    let major = parts.next().unwrap_or("0");
    let minor = parts.next().unwrap_or("0");
    let soname = match major {
        "0" => format!("libkmcl.so.0.{minor}"),
        major => format!("libkmcl.so.{major}"),
    };
    Names { file: format!("libkmcl.so.{version}"), soname }
}

fn pkg_config(prefix: &Path, version: &str) -> String {
    format!(
        "prefix={}\nlibdir=${{prefix}}/lib\nincludedir=${{prefix}}/include\n\n\
         Name: kmcl\n\
         Description: The VMBus Kernel Mode Client Library outside Windows\n\
         Version: {version}\n\
         Libs: -L${{libdir}} -lkmcl\n\
         Libs.private: -lpthread -ldl -lm\n\
         Cflags: -I${{includedir}}/kmcl\n",
        prefix.display()
    )
}

fn folder(path: PathBuf) -> Result<PathBuf, Failure> {
    match std::fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(Failure::File { path, source }),
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    // A library in use is replaced, not written into.
    let _gone_either_way = std::fs::remove_file(to);
    let copied = std::fs::copy(from, to);
    copied.map(|_| ()).map_err(|source| Failure::File { path: from.to_path_buf(), source })
}

fn link(target: &str, at: &Path) -> Result<(), Failure> {
    let _gone_either_way = std::fs::remove_file(at);
    symlink(target, at).map_err(|source| Failure::File { path: at.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_to_look_for_changes_with_the_binary_interface() {
        for (version, soname) in
            [("0.1.0", "libkmcl.so.0.1"), ("0.12.3", "libkmcl.so.0.12"), ("1.4.2", "libkmcl.so.1")]
        {
            let expected = Names { file: format!("libkmcl.so.{version}"), soname: soname.into() };
            assert_eq!(names(version), expected);
        }
    }
}
