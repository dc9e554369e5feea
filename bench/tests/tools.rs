//! The everyday tools, one after the other, on a small image.

mod common;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use common::{bench, formatted, make_tree};

#[test]
fn a_tree_goes_in_and_comes_out_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    let (source, restored) = (dir.path().join("source"), dir.path().join("restored"));
    let files = make_tree(&source);

    bench(["cp", "--device", &uri, "-r", source.to_str().unwrap(), ":tree/"]).ok();
    let listed = bench(["ls", "--device", &uri]).ok().text();
    let expected: Vec<String> = files.iter().map(|(name, _)| format!("tree/{name}")).collect();
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);

    bench(["cp", "--device", &uri, "-r", ":tree/", restored.to_str().unwrap()]).ok();
    for (name, bytes) in &files {
        assert_eq!(&std::fs::read(restored.join(name)).unwrap(), bytes, "{name}");
    }
    let (name, bytes) = files.iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
    let printed = bench(["cat", "--device", &uri, &format!("tree/{name}")]).ok();
    assert!(printed.stdout == *bytes);

    let report = bench(["check", "--device", &uri, "--json"]).ok().json();
    assert_eq!((&report["ok"], &report["files"]), (&true.into(), &files.len().into()));
}

#[test]
fn listings_tell_sizes_and_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    let empty = bench(["df", "--device", &uri, "--json"]).ok().json();
    assert_eq!(empty["files"], 0);
    let source = dir.path().join("source");
    let files = make_tree(&source);
    bench(["cp", "--device", &uri, "-r", source.to_str().unwrap(), ":"]).ok();

    let json = bench(["ls", "--device", &uri, "--json", "dir1/"]).ok().json();
    let listed: Vec<(String, u64)> = json
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (line["name"].as_str().unwrap().to_owned(), line["size"].as_u64().unwrap()))
        .collect();
    let expected: Vec<(String, u64)> = files
        .iter()
        .filter(|(name, _)| name.starts_with("dir1/"))
        .map(|(name, bytes)| (name.clone(), bytes.len() as u64))
        .collect();
    assert_eq!(listed, expected);
    let long = bench(["ls", "--device", &uri, "-l", "dir1/sub8"]).ok().text();
    assert!(long.contains("1500001") && long.contains("dir1/sub8/file-1500001.bin"), "{long}");

    let full = bench(["df", "--device", &uri, "--json"]).ok().json();
    assert_eq!(full["files"], files.len());
    let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(full["used_bytes"].as_u64().unwrap() - empty["used_bytes"].as_u64().unwrap() >= bytes as u64);
    assert!(bench(["df", "--device", &uri, "-h"]).ok().text().contains("MiB"));

    let last = &files[files.len() - 1].0;
    bench(["rm", "--device", &uri, last]).ok();
    bench(["cat", "--device", &uri, last]).failed(1, last);
    bench(["rm", "--device", &uri, last]).failed(1, last);
    bench(["rm", "--device", &uri, "-f", last]).ok();
    bench(["rm", "--device", &uri, "-r", ""]).failed(2, "--force");
    bench(["rm", "--device", &uri, "-r", "nothing/"]).failed(1, "nothing/");
    bench(["rm", "--device", &uri, "-r", "dir"]).ok();
    assert_eq!(bench(["ls", "--device", &uri]).ok().text(), "");
    let after = bench(["df", "--device", &uri, "--json"]).ok().json();
    assert_eq!(after["files"], 0);
    assert!(after["used_bytes"].as_u64() < full["used_bytes"].as_u64());
    bench(["check", "--device", &uri]).ok();
}

#[test]
fn single_files_are_copied_like_cp_does() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("a.txt"), "first").unwrap();
    std::fs::write(path("b.txt"), "the second").unwrap();

    bench(["cp", "--device", &uri, &path("a.txt"), &path("b.txt"), ":docs/"]).ok();
    assert_eq!(bench(["ls", "--device", &uri]).ok().text(), "docs/a.txt\ndocs/b.txt\n");
    assert_eq!(bench(["cat", "--device", &uri, "docs/a.txt", "docs/b.txt"]).ok().text(), "firstthe second");

    // Overwriting with something shorter leaves nothing of what was there.
    bench(["cp", "--device", &uri, &path("a.txt"), ":docs/b.txt"]).ok();
    assert_eq!(bench(["cat", "--device", &uri, "docs/b.txt"]).ok().text(), "first");

    std::fs::create_dir(path("out")).unwrap();
    bench(["cp", "--device", &uri, ":docs/a.txt", ":docs/b.txt", &path("out")]).ok();
    assert_eq!(std::fs::read_to_string(path("out/b.txt")).unwrap(), "first");
    bench(["cp", "--device", &uri, ":docs/a.txt", &path("c.txt")]).ok();
    assert_eq!(std::fs::read_to_string(path("c.txt")).unwrap(), "first");

    bench(["cp", "--device", &uri, &path("a.txt"), &path("b.txt"), ":one"]).failed(2, "slash");
    bench(["cp", "--device", &uri, &path("out"), ":one"]).failed(2, "-r");
    bench(["cp", "--device", &uri, &path("missing"), ":one"]).failed(1, "missing");
    bench(["cp", "--device", &uri, ":missing", &path("d.txt")]).failed(1, "missing");
    bench(["cat", "--device", &uri, ":docs/a.txt"]).failed(1, "colon");
    bench(["cp", "--device", &uri, &path("a.txt"), &format!(":{}", "x".repeat(300))]).failed(1, "255");
}

#[test]
fn names_are_bytes_and_cannot_escape_the_target() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    let file = dir.path().join("a");
    std::fs::write(&file, "x").unwrap();
    let odd: &[&[u8]] = &[b":good/\xff\xfe", b":../evil", b":/absolute", b":good//double"];
    for name in odd {
        let args = [
            OsStr::new("cp"),
            OsStr::new("--device"),
            OsStr::new(&uri),
            file.as_os_str(),
            OsStr::from_bytes(name),
        ];
        bench(args).ok();
    }
    let listed = bench(["ls", "--device", &uri]).ok().stdout;
    assert_eq!(listed, b"../evil\n/absolute\ngood//double\ngood/\xff\xfe\n");
    let json = bench(["ls", "--device", &uri, "--json", "good/"]).ok().json();
    assert_eq!(json[1]["name_hex"], "676f6f642ffffe");

    let target = dir.path().join("deep/target");
    let copied = bench(["cp", "--device", &uri, "-r", ":", target.to_str().unwrap()]);
    let refused = copied.failed(1, "../evil").stderr;
    assert!(refused.contains("/absolute") && refused.contains("good//double"));
    assert!(!dir.path().join("deep/evil").exists());
    assert_eq!(std::fs::read(target.join("good").join(OsStr::from_bytes(b"\xff\xfe"))).unwrap(), b"x");
}
