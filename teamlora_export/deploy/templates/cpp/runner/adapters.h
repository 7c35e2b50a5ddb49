// The adapters of a model that takes one for each row of a batch: files beside it, and slots in memory.
//
// deploy.json lists them, and is looked at again whenever it has changed: one that is added, replaced or removed while
// the model serves is so for the requests that come. Those that are at work keep theirs: the slot of an adapter that is
// held is not written to. Of the others, the one that was given back first makes room.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "folder.h"
#include "runner.h"
#include "slot_file.h"

namespace teamlora {

// The model's input with the slot of each row.
inline constexpr const char* kAdapterInput = "adapter";
// The slot of a row without an adapter.
inline constexpr std::int32_t kNoAdapter = -1;
// The slot of each row; none: the model has no slots.
using Slots = std::vector<std::int32_t>;

// An adapter as it was on the shelf when it was asked for.
struct Shelved {
    OpenedFile file;
    std::string sha256;

    // What tells its content in memory from all others'.
    std::string key() const { return file.path().string() + '\n' + sha256; }
};
// Null: the base alone.
using Found = std::shared_ptr<const Shelved>;

// Where the slots are that a back end's model reads.
class SlotMemory {
public:
    virtual ~SlotMemory() = default;
    // Writes what an adapter's file has for each input into `slot`, which no request holds; the next call of the model
    // sees it. Throws an Error where it cannot; what is in the slot is unknown then.
    virtual void fill(std::size_t slot, const SlotFile& file) = 0;
};

// The shelf of one open model; used by many threads.
class Adapters {
public:
    // `inputs`: the model's, in which it takes slots; they are in `memory`, which outlives this. Of `folder` the shelf
    // alone is read again. Throws an Error for options that are not as they can be.
    Adapters(const Folder& folder, const Options& options, std::vector<SlotInput> inputs, SlotMemory& memory);

    // The slots of a request's rows, which nobody writes to before this is gone.
    class Held {
    public:
        Held(Held&& other) noexcept;
        Held& operator=(Held&&) = delete;
        ~Held();
        const Slots& rows() const { return rows_; }

    private:
        friend class Adapters;
        explicit Held(Adapters& adapters) : adapters_(&adapters) {}
        Adapters* adapters_;
        Slots rows_;
        // Each once.
        std::vector<std::size_t> slots_;
    };

    // What is on the shelf.
    std::vector<std::string> names();
    std::size_t slots() const { return content_.size(); }

    // Throws an Error where there is none of that name, or its file cannot be opened.
    Found find(const std::string& name);

    // The adapters of a request's rows, in slots; waits while others are at work in too many of them. Throws an Error
    // where there are more of them than slots, one's file is not what belongs there, or none of the others has gone on
    // for as long as the options say; no slot has changed then.
    Held take(const std::vector<Found>& rows);
    // A request that holds slots has got a step further.
    void went_on();

    const std::vector<SlotInput>& inputs() const { return inputs_; }

private:
    using Clock = std::chrono::steady_clock;

    // When and what deploy.json was, which tells it from another that has taken its place.
    struct Stamp {
        std::int64_t seconds = 0, nanoseconds = 0;
        std::uint64_t inode = 0, size = 0;
        bool operator==(const Stamp& other) const {
            return seconds == other.seconds && nanoseconds == other.nanoseconds && inode == other.inode &&
                   size == other.size;
        }
    };
    Stamp stamp() const;
    // With `listing_` locked: `shelf_` is what deploy.json says now.
    void look_again();
    // The slot that has the content of that key; none: the number of slots.
    std::size_t slot_of(const std::string& key) const;
    // With `lock` on `counts_`: until the others hold few enough slots for `wanted`. `since`: when the request came.
    void wait_for_slots(std::unique_lock<std::mutex>& lock, const std::vector<Found>& wanted, Clock::time_point since);
    void hold(std::size_t slot, Held& held);
    void give(const std::vector<std::size_t>& slots);

    const Folder folder_;
    const bool check_;
    const std::chrono::seconds patience_;
    const std::vector<SlotInput> inputs_;
    SlotMemory& memory_;

    std::mutex listing_;
    Stamp seen_;
    Shelf shelf_;
    // Those that are in use, by key: requests of one adapter share its open file.
    std::map<std::string, std::weak_ptr<const Shelved>> opened_;

    // Who has it is the one who may change what is in slots.
    std::mutex turn_;
    // In each slot: the key of what is in it.
    std::vector<std::string> content_;

    // Of what follows.
    std::mutex counts_;
    std::condition_variable given_;
    // Of each slot: how many requests hold it. Free ones in the order in which they became so.
    std::vector<std::size_t> users_;
    std::deque<std::size_t> free_;
    // When a request went on or gave its slots back.
    std::atomic<Clock::time_point> moved_{Clock::now()};
};

}  // namespace teamlora
