//! Blocking calls: format a device in memory, write a file, read it back after a remount.
//!
//! `cargo run -p fs-core --example quickstart`

use bdev_adapter::{OpenOptions, open};
use fs_core::{Filesystem, FormatOptions, MountOptions, OpenFlags, format};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Any device URI works here: `mem:`, `file:PATH?size=1GiB`, `spdk-nvme:pcie:0000:00:04.0`, ...
    let device = open("mem:64MiB", &OpenOptions::default())?;
    format(&device, &FormatOptions::default())?;

    let fs = Filesystem::mount(device.clone(), &MountOptions::default())?;
    let channel = fs.channel()?;
    let file = channel.open("greeting", OpenFlags::CREATE)?;
    channel.write(&file, 0, b"hello, world")?;
    channel.append(&file, b"!")?;
    channel.sync_file(&file)?; // from here on it survives any crash
    channel.close(file)?;
    fs.unmount()?;

    let fs = Filesystem::mount(device, &MountOptions::default())?;
    let channel = fs.channel()?;
    let file = channel.open("greeting", OpenFlags::default())?;
    let mut text = [0; 64];
    let n = channel.read(&file, 0, &mut text)?;
    println!("{}", String::from_utf8_lossy(&text[..n]));
    for entry in channel.list("") {
        let entry = entry?;
        println!("{} is file {}", String::from_utf8_lossy(&entry.name), entry.id);
    }
    Ok(())
}
