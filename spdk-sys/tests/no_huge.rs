//! SPDK in ordinary memory: it starts, hands out memory for DMA and makes threads, without root and without a huge page.
//! An environment can be initialised once in a process, so this is a test program of its own with one test.

use std::ptr;

use spdk_sys::env::{gaur_env_init, gaur_env_opts};
use spdk_sys::memory::{spdk_dma_free, spdk_dma_zmalloc};
use spdk_sys::thread::{gaur_thread_destroy, spdk_thread_create};

#[test]
fn it_works_in_ordinary_memory() {
    // SAFETY: only reads the set of this thread.
    let affinity = unsafe {
        let mut set = std::mem::zeroed::<libc::cpu_set_t>();
        assert_eq!(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set), 0);
        set
    };
    let core = (0..128).find(|&cpu| {
        // SAFETY: reads a bit inside the set.
        unsafe { libc::CPU_ISSET(cpu, &affinity) }
    });
    let mut opts = gaur_env_opts {
        name: c"gaur-no-huge".as_ptr(),
        core: core.expect("this thread runs somewhere") as u32,
        mem_mib: -1,
        no_pci: false,
        iova_va: true,
        no_huge: true,
    };
    // SAFETY: `opts` and its name live over the call; it is refused before anything is initialised.
    assert_eq!(unsafe { gaur_env_init(&opts) }, -libc::EINVAL, "how much memory must be said");
    opts.mem_mib = 192;
    // SAFETY: as above, and this is the only initialisation of the process.
    assert_eq!(unsafe { gaur_env_init(&opts) }, 0);

    const LEN: usize = 8 << 20;
    // SAFETY: the environment is initialised.
    let memory = unsafe { spdk_dma_zmalloc(LEN, 2 << 20, ptr::null_mut()) }.cast::<u8>();
    assert!(!memory.is_null());
    assert_eq!(memory as usize % (2 << 20), 0);
    // SAFETY: `LEN` bytes that were just handed out, and nobody else's.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory, LEN) };
    assert!(bytes.iter().all(|&byte| byte == 0));
    bytes.fill(0xa5);
    // SAFETY: handed out above, and not used afterwards.
    unsafe { spdk_dma_free(memory.cast()) };

    // SAFETY: the thread library is initialised; the name is copied; nobody else uses the thread.
    unsafe {
        let thread = spdk_thread_create(c"test".as_ptr(), ptr::null_mut());
        assert!(!thread.is_null());
        assert!(gaur_thread_destroy(thread, 5_000));
    }
}
