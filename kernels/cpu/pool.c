// Threads that help the caller of an op, when they happen to be awake.
//
// A job is cut into lanes, one a thread, and a lane into chunks. A thread takes the chunks of its own lane one after
// the other, so that it reads memory in order, then those of the other lanes. The job is over when all chunks are done,
// not when all threads have come by: a helper that waits for its time slice costs nothing unless it holds a chunk.
//
// Invariant: who lowers a lane's num_untaken from n > 0 owns chunk num_chunks - n of that lane, of the job that stands
// in the pool, and that job stays there until its owner has raised num_done: the caller waits until all chunks are done
// before it returns, and only then can another job be written. Helpers read the fields of a job as owners only. So one
// that comes late, even if it sleeps through a thousand jobs between reading num_untaken and lowering it, gets a chunk
// of the present job or none.
#define _GNU_SOURCE
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256
#define MAX_CHUNKS_PER_LANE 64
#define HELPER_SPIN_NS 50000  // longer than the gap between two ops: then waking costs no system call
#define CALLER_SPIN_NS 50000  // longer than most chunks: beyond it, the owner waits for a core, perhaps this one
#define CACHE_LINE 64

typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint32_t num_untaken;
} lane;

static struct {
    // The job; written by the thread that holds `is_busy`, before the lanes are filled.
    work_body *body;
    const void *context;
    int64_t size;
    uint32_t num_lanes, num_chunks;  // num_chunks of each lane

    _Alignas(CACHE_LINE) _Atomic uint32_t num_jobs;  // raised when the lanes are filled; helpers sleep on it
    _Atomic int num_sleeping;
    _Alignas(CACHE_LINE) _Atomic uint32_t num_done;  // chunks; the caller sleeps on it
    _Atomic int caller_sleeps;
    _Alignas(CACHE_LINE) atomic_flag is_busy;
    int num_threads, has_helpers;  // num_threads stays once there are helpers
    lane lanes[MAX_THREADS];
} pool = {.is_busy = ATOMIC_FLAG_INIT, .num_threads = 1};

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t *word, int num_threads) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, num_threads, NULL, NULL, 0);
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

// Whether *word became something else than value within the time.
static int spin_while(_Atomic uint32_t *word, uint32_t value, int64_t limit_ns) {
    const int64_t end = now_ns() + limit_ns;
    do
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
            relax();
        }
    while (now_ns() < end);
    return 0;
}

static void do_chunk(const uint32_t lane, const uint32_t chunk) {
    const int64_t index = (int64_t)lane * pool.num_chunks + chunk, total = (int64_t)pool.num_lanes * pool.num_chunks;
    const int64_t first = pool.size * index / total, last = pool.size * (index + 1) / total;
    if (first < last) pool.body(pool.context, first, last);
    if (atomic_fetch_add(&pool.num_done, 1) + 1 == total && atomic_load(&pool.caller_sleeps)) wake(&pool.num_done, 1);
}

// Takes chunks as long as there are any, those of the thread's own lane first.
static void do_chunks(int thread) {
    for (int i = 0; i < pool.num_threads; i++) {
        const int lane = (thread + i) % pool.num_threads;
        _Atomic uint32_t *num_untaken = &pool.lanes[lane].num_untaken;
        uint32_t n = atomic_load_explicit(num_untaken, memory_order_relaxed);
        while (n > 0) {
            if (!atomic_compare_exchange_weak_explicit(num_untaken, &n, n - 1, memory_order_acquire,
                                                       memory_order_relaxed))
                continue;
            do_chunk(lane, pool.num_chunks - n);
            n = atomic_load_explicit(num_untaken, memory_order_relaxed);
        }
    }
}

static void *help(void *thread) {
    for (;;) {
        const uint32_t num_jobs = atomic_load(&pool.num_jobs);
        do_chunks((int)(intptr_t)thread);
        if (spin_while(&pool.num_jobs, num_jobs, HELPER_SPIN_NS)) continue;
        atomic_fetch_add(&pool.num_sleeping, 1);  // then num_jobs is read; the caller goes the other way round
        sleep_while(&pool.num_jobs, num_jobs);
        atomic_fetch_sub(&pool.num_sleeping, 1);
    }
    return NULL;
}

static void wait_for_owners(void) {
    const uint32_t total = pool.num_lanes * pool.num_chunks;
    for (uint32_t done; (done = atomic_load(&pool.num_done)) < total;) {
        if (spin_while(&pool.num_done, done, CALLER_SPIN_NS)) continue;
        atomic_store(&pool.caller_sleeps, 1);  // then num_done is read; the last owner goes the other way round
        sleep_while(&pool.num_done, done);
        atomic_store(&pool.caller_sleeps, 0);
    }
}

// A child of fork has none of its parent's helpers, and perhaps half a job of another thread.
static void forget_helpers(void) {
    for (int i = 0; i < MAX_THREADS; i++) atomic_store(&pool.lanes[i].num_untaken, 0);
    atomic_store(&pool.num_sleeping, 0);
    atomic_store(&pool.caller_sleeps, 0);
    atomic_flag_clear(&pool.is_busy);
    pool.has_helpers = 0;
}

// Where the system grants fewer than wished, the others do their lanes too.
static void start_helpers(void) {
    static int is_registered;  // a child inherits the registration
    if (!is_registered) pthread_atfork(NULL, NULL, forget_helpers);
    is_registered = 1;
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t helper;
    for (int i = 1; i < pool.num_threads && pthread_create(&helper, NULL, help, (void *)(intptr_t)i) == 0; i++)
        pthread_detach(helper);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool.has_helpers = 1;
}

void parallel_for(int64_t size, int64_t grain, work_body *body, const void *context) {
    const int64_t num_grains = (size + grain - 1) / grain;
    // Another thread's job is not waited for: it may take long.
    if (num_grains <= 1 || pool.num_threads == 1 || atomic_flag_test_and_set(&pool.is_busy)) {
        body(context, 0, size);
        return;
    }
    if (!pool.has_helpers) start_helpers();
    const int64_t num_lanes = num_grains < pool.num_threads ? num_grains : pool.num_threads;
    const int64_t num_chunks = (num_grains + num_lanes - 1) / num_lanes;
    pool.body = body;
    pool.context = context;
    pool.size = size;
    pool.num_lanes = num_lanes;
    pool.num_chunks = num_chunks < MAX_CHUNKS_PER_LANE ? num_chunks : MAX_CHUNKS_PER_LANE;
    atomic_store_explicit(&pool.num_done, 0, memory_order_relaxed);
    for (int i = 0; i < num_lanes; i++)
        atomic_store_explicit(&pool.lanes[i].num_untaken, pool.num_chunks, memory_order_release);
    atomic_fetch_add(&pool.num_jobs, 1);
    if (atomic_load(&pool.num_sleeping)) wake(&pool.num_jobs, num_lanes - 1);
    do_chunks(0);
    wait_for_owners();
    atomic_flag_clear(&pool.is_busy);
}

void set_num_threads(int num_threads) {
    if (!pool.has_helpers) pool.num_threads = num_threads < MAX_THREADS ? num_threads : MAX_THREADS;
}
