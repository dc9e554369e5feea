//! What the unit tests of this crate share.

/// The seed of a randomised test: `GAUR_SEED`, else the clock. It is printed, so that a failure can be replayed.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("GAUR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    println!("GAUR_SEED={seed}");
    seed
}

/// Ends the process when its tests take so long that one must hang. Call it where a test may wait for a device.
pub(crate) fn limit_time() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            std::thread::sleep(std::time::Duration::from_secs(300));
            eprintln!("a test hangs: not done after 300 s");
            std::process::abort();
        });
    });
}
