//! Images made by qemu's tools.

use std::path::{Path, PathBuf};

use bedplate::disk::Sealed;
use bedplate::image::{Opening, View};

use super::{Random, qemu_io_as, run};

pub fn create(dir: &Path, options: &str, size: u64) -> PathBuf {
    let image = dir.join("image.qcow2");
    let _may_not_exist = std::fs::remove_file(&image);
    let (path, size) = (image.to_str().unwrap(), size.to_string());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, path, &size]);
    image
}

pub fn qemu_io(image: &Path, commands: &[String]) {
    qemu_io_as("qcow2", image, commands);
}

/// Writes, zero writes and discards at places of any alignment. With `compressed`, some clusters
/// are written compressed first: qemu takes that only where nothing is stored.
pub fn commands(random: &mut Random, size: u64, cluster: u64, compressed: bool) -> Vec<String> {
    let mut commands = Vec::new();
    if compressed {
        let step = random.below(4) + 1;
        let whole = (0..size / cluster).step_by(usize::try_from(step).unwrap()).take(12);
        commands.extend(
            whole.map(|n| {
                format!("write -c -P {} {} {cluster}", random.below(255) + 1, n * cluster)
            }),
        );
    }
    for n in 0..20 {
        let at = random.below(size / 512) * 512;
        let most = (3 * cluster).min(size - at) / 512;
        let len = (random.below(most) + 1) * 512;
        let pattern = random.below(255) + 1;
        commands.push(match n % 5 {
            0 | 1 => format!("write -P {pattern} {at} {len}"),
            2 => format!("write -z {at} {len}"),
            3 => format!("write -z -u {at} {len}"),
            _ => format!("discard {at} {len}"),
        });
    }
    commands
}

/// An overlay over `base` by its name, as qemu makes it.
pub fn overlay(
    dir: &Path,
    name: &str,
    base: &Path,
    format: &str,
    options: &str,
    size: u64,
) -> PathBuf {
    let image = dir.join(name);
    let (path, size) = (image.to_str().unwrap(), size.to_string());
    let base = base.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-b", base, "-F", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path, &size]);
    run("qemu-img", &args);
    image
}

pub fn open_over(image: &Path, base: &View) -> View {
    let opening = Opening { base: Some(base), ..Opening::default() };
    View::open_as(Sealed::open_path(image).unwrap(), opening).unwrap()
}
