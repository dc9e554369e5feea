//! Faults of the data: rot, stale, torn, misdirected and lost.

use super::*;

fn raw(memory: &MemDevice, offset: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    memory.read_raw(offset, &mut bytes).unwrap();
    bytes
}

fn read(io: &mut BlockingIo, offset: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    io.read(offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn rot_stays_until_the_block_is_written() {
    for seed in 0..20 {
        let seed = seed.to_string();
        let (memory, device, mut io) = wrapped(&[("seed", &seed), ("bit_rot_nth", "1")]);
        io.write(0, &[0; 4096]).unwrap();
        let mut bytes = [0; 4096];
        io.read(0, &mut bytes).unwrap();
        let flipped: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
        assert!((1..=3).contains(&flipped), "{flipped} bits");
        let rotten: Vec<_> = (0..8).filter(|block| bytes[block * 512..][..512] != [0; 512]).collect();
        let [block] = rotten[..] else { panic!("blocks {rotten:?} are rotten") };
        let at = block as u64 * 512;
        // The same way again: alone, in other buffers, through another queue pair, under another plan.
        device.set_plan(FaultPlan::default());
        assert_eq!(read(&mut io, at), bytes[block * 512..][..512]);
        let mut other = BlockingIo::new(&(device.clone() as Arc<dyn Device>)).unwrap();
        let bufs: Vec<_> = (0..8).map(|_| other.buffer(512).unwrap()).collect();
        let completion = other.run(Request::read(0, bufs, 1));
        let again: Vec<u8> = completion.bufs.as_slice().iter().flat_map(|buf| buf.iter().copied()).collect();
        assert_eq!(again, bytes);
        assert_eq!(raw(&memory, at), [0; 512], "rot lives in the wrapper");
        // A neighbour's write heals nothing, the block's own does.
        io.write((at + 512) % 4096, &[0; 512]).unwrap();
        assert_eq!(device.rotten_blocks(), 1);
        io.write(at, &[0; 512]).unwrap();
        assert_eq!((read(&mut io, at), device.rotten_blocks()), ([0; 512], 0));
    }
}

#[test]
fn rot_in_a_range_and_healing() {
    let (_, device, mut io) = wrapped(&[("bit_rot_range", "1024-1536"), ("lost_write_nth", "1")]);
    io.read(0, &mut [0; 4096]).unwrap();
    assert_ne!(read(&mut io, 1024), [0; 512]);
    assert_eq!((read(&mut io, 512), read(&mut io, 1536)), ([0; 512], [0; 512]));
    io.write(1024, &[0; 512]).unwrap();
    assert_eq!(device.rotten_blocks(), 1, "a lost write heals nothing");
    device.set_plan(FaultPlan::default());
    assert_ne!(read(&mut io, 1024), [0; 512]);
    device.heal();
    assert_eq!(read(&mut io, 1024), [0; 512]);
    let plan = FaultPlan::new(1, vec![Fault::new(Target::Reads, When::Probability(1.0), Effect::Rot)]);
    device.set_plan(plan);
    read(&mut io, 0);
    device.set_plan(FaultPlan::default());
    io.write_zeroes(0, 1 << 20).unwrap();
    assert_eq!(device.rotten_blocks(), 0);
}

#[test]
fn a_stale_read_returns_what_was_there_before_the_last_change() {
    let (memory, device, mut io) = wrapped(&[("stale_read_nth", "2")]);
    memory.write_raw(0, &[1; 512]).unwrap();
    io.write(0, &[2; 1024]).unwrap();
    assert_eq!(read(&mut io, 0), [2; 512]);
    let mut bytes = [0; 2048];
    io.read(0, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[512], bytes[1024]), (1, 0, 0), "what the blocks held before");
    assert_eq!(read(&mut io, 0), [2; 512], "once");
    assert_eq!(device.hits(), 1);
    // Flushed or not, changed twice or zeroed.
    device.set_plan(FaultPlan::new(1, vec![Fault::new(Target::Reads, When::Range(0..512), Effect::Stale)]));
    io.flush().unwrap();
    assert_eq!(read(&mut io, 0), [1; 512]);
    io.write(0, &[3; 512]).unwrap();
    assert_eq!(read(&mut io, 0), [2; 512]);
    io.write_zeroes(0, 512).unwrap();
    assert_eq!(read(&mut io, 0), [3; 512]);
    let before = device.hits();
    device.set_plan(FaultPlan::new(1, vec![Fault::new(Target::Reads, When::After(0), Effect::Stale)]));
    read(&mut io, 1 << 20);
    assert_eq!(
        (before, device.hits()),
        (3, 0),
        "of a block that was never changed there is no older content"
    );
}

#[test]
fn a_silently_torn_write_says_ok_and_leaves_a_prefix() {
    let mut prefixes = std::collections::HashSet::new();
    for seed in 0..60 {
        let seed = seed.to_string();
        let (memory, device, mut io) = wrapped(&[("seed", &seed), ("torn_write_silent_nth", "1")]);
        let bufs: Vec<_> = [512, 2048, 1536].map(|len| io.buffer(len).unwrap()).into();
        let mut request = Request::write(4096, bufs, 42);
        request.bufs.as_mut_slice().iter_mut().for_each(|buf| buf.fill(0xEE));
        let completion = io.run(request);
        assert_eq!((completion.tag, completion.result), (42, Ok(())));
        let back: Vec<_> = completion.bufs.as_slice().iter().map(|buf| buf.len()).collect();
        assert_eq!(back, [512, 2048, 1536], "the buffers come back as they were");
        let mut bytes = [0; 4096];
        memory.read_raw(4096, &mut bytes).unwrap();
        let written = bytes.iter().take_while(|byte| **byte == 0xEE).count();
        assert!(bytes[written..].iter().all(|byte| *byte == 0));
        assert!(written % 512 == 0 && written < 4096);
        prefixes.insert(written);
        assert!(!device.is_gone());
        io.write(4096, &[1; 4096]).unwrap();
        assert_eq!(read(&mut io, 8192 - 512), [1; 512]);
    }
    assert!(prefixes.len() >= 6, "tears at few places: {prefixes:?}");
}

#[test]
fn torn_zeroes_are_a_prefix_too() {
    let (memory, device, mut io) = wrapped(&[("seed", "3"), ("torn_write_nth", "2"), ("volatile", "on")]);
    io.write(0, &[7; 8192]).unwrap();
    assert_eq!(kind(io.write_zeroes(0, 8192)), IoErrorKind::Gone);
    let mut bytes = [0; 8192];
    memory.read_raw(0, &mut bytes).unwrap();
    let zeroed = bytes.iter().take_while(|byte| **byte == 0).count();
    assert!(zeroed % 512 == 0 && zeroed > 0 && zeroed < 8192, "{zeroed} of 8192");
    assert!(bytes[zeroed..].iter().all(|byte| *byte == 7) && device.is_gone());
}

#[test]
fn a_misdirected_write_lands_elsewhere() {
    let mut places = std::collections::HashSet::new();
    for seed in 0..40u64 {
        let (len, at) = if seed % 2 == 0 { (8192, 65536) } else { (1536, 512) };
        let seed = seed.to_string();
        let (memory, _, mut io) = wrapped(&[("seed", &seed), ("misdirected_write_nth", "2")]);
        io.write(at, &vec![1; len]).unwrap();
        io.write(at, &vec![2; len]).unwrap();
        let mut all = vec![0; 4 * MIB as usize];
        memory.read_raw(0, &mut all).unwrap();
        assert!(all[at as usize..][..len].iter().all(|byte| *byte == 1), "the right place keeps its content");
        let place = all.iter().position(|byte| *byte == 2).expect("it landed somewhere");
        assert_eq!(all.iter().filter(|byte| **byte == 2).count(), len);
        assert!(all[place..][..len].iter().all(|byte| *byte == 2), "in one piece");
        assert_eq!(place % if len == 8192 { 4096 } else { 512 }, 0);
        places.insert(place);
        let error = io.read(4 * MIB, &mut [0; 512]).unwrap_err();
        assert_eq!(error.kind, IoErrorKind::OutOfRange);
    }
    assert!(places.len() > 30, "{places:?}");
}

#[test]
fn a_misdirected_write_without_another_place_is_lost() {
    let memory = MemDevice::new(8192, 4096).unwrap();
    let plan = FaultPlan::new(1, vec![Fault::new(Target::Writes, When::After(0), Effect::Misdirected)]);
    let device: Arc<dyn Device> = FaultDevice::wrap(memory.clone(), plan);
    let mut io = BlockingIo::new(&device).unwrap();
    io.write(0, &[1; 8192]).unwrap();
    assert_eq!(memory.snapshot().chunks().count(), 0);
    io.write(0, &[1; 4096]).unwrap();
    assert_eq!((raw(&memory, 0)[0], raw(&memory, 4096)[0]), (0, 1));
}

#[test]
fn a_misdirected_write_never_touches_its_right_place() {
    let mut places = std::collections::HashSet::new();
    for seed in 0..300 {
        // Little room beside it: blocks 5 to 8 of 16.
        let memory = MemDevice::new(8192, 512).unwrap();
        let plan = FaultPlan::new(seed, vec![Fault::new(Target::Writes, When::Nth(1), Effect::Misdirected)]);
        let device: Arc<dyn Device> = FaultDevice::wrap(memory.clone(), plan);
        BlockingIo::new(&device).unwrap().write(5 * 512, &[1; 4 * 512]).unwrap();
        let mut all = [0; 8192];
        memory.read_raw(0, &mut all).unwrap();
        let blocks: Vec<_> = (0..16).filter(|block| all[block * 512] == 1).collect();
        assert!(blocks.len() == 4 && blocks.iter().all(|block| !(5..9).contains(block)), "{blocks:?}");
        places.insert(blocks[0]);
    }
    assert_eq!(places.len(), 2 + 4, "every place that is aligned as it was: {places:?}");
}
