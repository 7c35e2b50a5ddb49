#include "emulation.h"

#if !defined(__x86_64__)
#include <setjmp.h>
#include <ucontext.h>
#endif

#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Leaves the registers that a call leaves as they were on this stack, its end in `from`, and takes them from another.
extern "C" void teamlora_switch_stack(void*** from, void** to);
asm(R"(
    .pushsection .text
    .type teamlora_switch_stack, @function
teamlora_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size teamlora_switch_stack, . - teamlora_switch_stack
    .popsection
)");
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 48 * 1024;
// Blocks that have begun and not ended.
constexpr size_t kMostResident = 12;

struct Copy {
    void* target;
    const void* source;
    size_t size, zeros;
};

void fiber_main();

#if defined(__x86_64__)
// A place to go on from: the end of a stack, where the registers lie that a call leaves as they were. swapcontext would
// ask the kernel for the signal mask each time, and AddressSanitizer would forget what is poisoned on a stack.
struct Context {
    void** end = nullptr;
};

// Make `context` the beginning of `fiber_main` on a stack.
void begin(Context& context, char* stack) {
    // Six registers, what is returned to, and that this has no caller; a call leaves 8 bytes above a boundary of 16.
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    std::fill(top - 8, top, nullptr);
    top[-2] = reinterpret_cast<void*>(fiber_main);
    context.end = top - 8;
}

void jump(Context& from, const Context& to) { teamlora_switch_stack(&from.end, to.end); }
#else
// A place to go on from. swapcontext asks the kernel for the signal mask each time, so it only starts a fiber;
// AddressSanitizer follows nothing else.
struct Context {
    ucontext_t start;
    jmp_buf resume;
    bool started = true;
};

void begin(Context& context, char* stack) {
    context.started = false;
    getcontext(&context.start);
    context.start.uc_stack.ss_sp = stack;
    context.start.uc_stack.ss_size = kStackBytes;
    context.start.uc_link = nullptr;
    makecontext(&context.start, fiber_main, 0);
}

void jump(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.start, &to.start);
#else
    if (_setjmp(from.resume) != 0) return;
    if (std::exchange(to.started, true)) _longjmp(to.resume, 1);
    setcontext(&to.start);
#endif
}
#endif

enum class State { kRunnable, kAtWarpBarrier, kAtBlockBarrier, kFinished };

struct Fiber {
    Thread thread;
    State state = State::kRunnable;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    Context context;
    std::vector<Copy> open_copies;
    std::vector<std::vector<Copy>> groups;
    bool has_waited = false;
};

struct Warp {
    char slots[32][kSlotBytes];
};

std::mt19937_64 generator;
uint64_t schedule_seed = 0;

std::vector<size_t> order(size_t count) {
    std::vector<size_t> all(count);
    std::iota(all.begin(), all.end(), size_t{0});
    if (schedule_seed == 1) std::reverse(all.begin(), all.end());
    if (schedule_seed > 1) std::shuffle(all.begin(), all.end(), generator);
    return all;
}

bool coin() { return schedule_seed == 0 ? false : schedule_seed == 1 ? true : generator() % 2 == 0; }

// One block of threads. `run` goes on until all have finished, or one of them touched what blocks share.
class Block {
public:
    Block(dim3 size, size_t shared_bytes) : fibers_(size.x), warps_((size.x + 31) / 32), shared_bytes_(shared_bytes) {
        // On a boundary of 128 bytes, as on a GPU, and no longer than what was asked for.
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
        shared_.reset(static_cast<float*>(memory));
    }

    void start(dim3 index) {
        this->index = index;
        std::fill_n(shared_.get(), shared_bytes_ / sizeof(float), std::numeric_limits<float>::quiet_NaN());
        for (size_t i = 0; i < fibers_.size(); ++i) prepare(fibers_[i], i);
    }

    bool finished() const { return count_in(State::kFinished) == fibers_.size(); }
    void run();

    float* shared() { return shared_.get(); }
    void* slot(const Fiber& fiber, int lane) { return warps_[(&fiber - fibers_.data()) / 32].slots[lane]; }

    dim3 index;
    // Set by a thread that touched what blocks share: the others of the block wait until other blocks have run.
    bool yielding = false;

private:
    static void prepare(Fiber& fiber, size_t i) {
        fiber.thread = {dim3(static_cast<unsigned>(i), 0, 0), static_cast<int>(i % 32)};
        fiber.state = State::kRunnable;
        fiber.open_copies.clear();
        fiber.groups.clear();
        fiber.has_waited = false;
#if defined(__SANITIZE_ADDRESS__)
        // The last thread on this stack never returned.
        __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
        begin(fiber.context, fiber.stack.get());
    }

    void run_warp(size_t warp, const std::vector<size_t>& lanes);
    void release_barrier();
    void unwind();

    size_t count_in(State state) const {
        return std::count_if(fibers_.begin(), fibers_.end(), [&](const Fiber& fiber) { return fiber.state == state; });
    }

    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::unique_ptr<float, decltype(&std::free)> shared_{nullptr, std::free};
    size_t shared_bytes_;
};

Block* running_block = nullptr;
Fiber* running = nullptr;
const std::function<void()>* running_kernel = nullptr;
std::exception_ptr failure;
Context scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
// Grids that were launched and have not run, in their order.
std::vector<Grid> open_grids;
bool is_waited_for = false;
// Whether a call has begun and its last kernel was not launched yet; whether the running grid's threads have to wait.
bool call_is_open = false, has_to_wait = false;
std::string reason;
// Where grids go instead of being run, if anywhere.
std::vector<Grid>* recorded = nullptr;

// `stack`: that of `to`. `for_good`: nothing will go on at `from`.
void switch_context(Context& from, Context& to, const void* stack, size_t size, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, stack, size);
    jump(from, to);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    static_cast<void>(stack);
    static_cast<void>(size);
    static_cast<void>(for_good);
    jump(from, to);
#endif
}

void to_scheduler() {
    const bool for_good = running->state == State::kFinished;
    switch_context(running->context, scheduler, scheduler_stack, scheduler_stack_size, for_good);
}

void pause(State state) {
    running->state = state;
    to_scheduler();
    if (failure) std::rethrow_exception(failure);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    try {
        (*running_kernel)();
        for (const auto& group : running->groups) {
            if (!group.empty()) throw std::logic_error("an asynchronous copy that nobody waits for");
        }
        if (!running->open_copies.empty()) throw std::logic_error("an asynchronous copy in no group");
        require_that_has_waited();
    } catch (...) {
        if (!failure) failure = std::current_exception();
    }
    running->state = State::kFinished;
    to_scheduler();
}

void resume(Fiber& fiber) {
    running = &fiber;
    fiber.state = State::kRunnable;
    switch_context(scheduler, fiber.context, fiber.stack.get(), kStackBytes, false);
    running = nullptr;
}

void Block::run() {
    running_block = this;
    yielding = false;
    while (!finished() && !yielding) {
        const std::vector<size_t> lanes = order(32);
        for (const size_t warp : order(warps_.size())) {
            if (!yielding) run_warp(warp, lanes);
        }
        if (failure) return unwind();
        if (!yielding) release_barrier();
    }
}

// As far as this warp can go without the others.
void Block::run_warp(size_t warp, const std::vector<size_t>& lanes) {
    for (bool progress = true; progress;) {
        progress = false;
        size_t waiting = 0, present = 0;
        for (const size_t lane : lanes) {
            if (warp * 32 + lane >= fibers_.size()) continue;
            Fiber& fiber = fibers_[warp * 32 + lane];
            if (fiber.state == State::kRunnable) {
                resume(fiber);
                progress = true;
                if (yielding) return;
            }
            ++present;
            waiting += fiber.state == State::kAtWarpBarrier;
        }
        if (waiting < present) continue;
        progress = true;
        for (const size_t lane : lanes) {
            if (warp * 32 + lane < fibers_.size()) fibers_[warp * 32 + lane].state = State::kRunnable;
        }
    }
}

void Block::release_barrier() {
    if (count_in(State::kAtBlockBarrier) == fibers_.size()) {
        for (Fiber& fiber : fibers_) fiber.state = State::kRunnable;
    } else if (!finished()) {
        failure = std::make_exception_ptr(std::logic_error("a barrier that not all threads of a block reach"));
        unwind();
    }
}

// Lets every thread leave its kernel with the failure.
void Block::unwind() {
    running_block = this;
    for (Fiber& fiber : fibers_) {
        while (fiber.state != State::kFinished) resume(fiber);
    }
}

void carry_out(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        std::memcpy(copy.target, copy.source, copy.size - copy.zeros);
        std::memset(static_cast<char*>(copy.target) + copy.size - copy.zeros, 0, copy.zeros);
    }
}

void run_open_grids();

void run_now(const Grid& grid) {
    const auto make_current = [&] {
        running_kernel = &grid.kernel;
        current_grid = grid.size;
        current_block_size = grid.block_size;
        has_to_wait = grid.waits;
    };
    make_current();
    std::vector<std::unique_ptr<Block>> idle, resident;
    const std::vector<size_t> blocks = order(size_t{grid.size.x} * grid.size.y * grid.size.z);
    for (size_t next = 0; (next < blocks.size() || !resident.empty()) && !failure;) {
        std::unique_ptr<Block> block;
        if (next < blocks.size() && resident.size() < kMostResident) {
            const size_t index = blocks[next++];
            if (idle.empty()) idle.push_back(std::make_unique<Block>(grid.block_size, grid.shared_bytes));
            block = std::move(idle.back());
            idle.pop_back();
            block->start(
                dim3(index % grid.size.x, index / grid.size.x % grid.size.y, index / grid.size.x / grid.size.y));
        } else {
            // The last to touch what blocks share goes on first, or the first, or any.
            const size_t last = resident.size() - 1;
            const size_t chosen = schedule_seed == 0 ? last : schedule_seed == 1 ? 0 : generator() % resident.size();
            block = std::move(resident[chosen]);
            resident.erase(resident.begin() + static_cast<ptrdiff_t>(chosen));
        }
        block->run();
        (block->finished() ? idle : resident).push_back(std::move(block));
        if (std::exchange(is_waited_for, false)) {
            run_open_grids();
            make_current();
        }
    }
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

// The last to be launched begins first: it finds those ahead of it done only if it waits for them.
void run_open_grids() {
    while (!open_grids.empty()) {
        const Grid grid = std::move(open_grids.back());
        open_grids.pop_back();
        run_now(grid);
    }
}

}  // namespace

dim3 current_grid, current_block_size;

void set_schedule(uint64_t seed) {
    schedule_seed = seed;
    generator.seed(seed);
    give_up("");
}

void give_up(const char* why) {
    reason = why;
    open_grids.clear();
    is_waited_for = call_is_open = false;
}

const Thread& current() { return running->thread; }
dim3 current_block() { return running_block->index; }
float* dynamic_shared() { return running_block->shared(); }
void block_barrier() { pause(State::kAtBlockBarrier); }
void warp_barrier() { pause(State::kAtWarpBarrier); }
void* lane_slot(int lane) { return running_block->slot(*running, lane); }

void let_other_blocks_run() {
    running_block->yielding = true;
    pause(State::kRunnable);
}

void copy_async(void* target, const void* source, size_t size, size_t zeros) {
    const auto misaligned = [&](const void* address) { return reinterpret_cast<uintptr_t>(address) % size != 0; };
    if (size != 4 && size != 8 && size != 16) throw std::logic_error("an asynchronous copy of another size");
    if (misaligned(target) || misaligned(source)) throw std::logic_error("an unaligned asynchronous copy");
    const Copy copy{target, source, size, zeros};
    if (coin()) {
        carry_out({copy});
    } else {
        running->open_copies.push_back(copy);
    }
}

void commit_copies() { running->groups.push_back(std::exchange(running->open_copies, {})); }

void wait_copies(int still_open) {
    auto& groups = running->groups;
    while (groups.size() > static_cast<size_t>(still_open)) {
        carry_out(groups.front());
        groups.erase(groups.begin());
    }
}

void run_grid(Grid grid, Place place, bool overlaps) {
    if (recorded != nullptr) {
        recorded->push_back(grid);
        return;
    }
    const bool first = place == Place::kFirst, last = place == Place::kLast;
    if (first == call_is_open) throw std::logic_error(first ? "a call within another" : "a kernel that follows none");
    call_is_open = !last;
    grid.waits = overlaps && !first;
    if (overlaps && !last && coin()) {
        open_grids.push_back(grid);
        return;
    }
    run_now(grid);
    if (last) run_open_grids();
}

std::vector<Grid> record(const std::function<void()>& launch) {
    std::vector<Grid> grids;
    recorded = &grids;
    launch();
    recorded = nullptr;
    return grids;
}

void require_that_has_waited() {
    if (has_to_wait && !running->has_waited) throw std::logic_error("a thread that does not wait for the kernel ahead");
}

void wait_for_grids_before() {
    running->has_waited = true;
    if (open_grids.empty()) return;
    is_waited_for = true;
    let_other_blocks_run();
}

}  // namespace emulation

// The calls of CUDA's runtime that a launch makes, and the plugin around it.
extern "C" cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
extern "C" const char* cudaGetErrorString(cudaError_t) {
    return emulation::reason.empty() ? "an emulated error" : emulation::reason.c_str();
}
