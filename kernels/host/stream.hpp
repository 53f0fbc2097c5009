// Streams, events and graph capture.
//
// An operation given to a stream runs at once, unless the stream is being captured (it is recorded) or work
// is deferred (settings.hpp: it waits in a queue until something waits for the stream). Deferring shows what
// a program forgot to wait for: device work happens as late as the program allows.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "error.hpp"
#include "handles.hpp"

namespace host {

/// A launch, copy, fill or free: whatever a stream can hold.
struct Operation {
    std::string name;
    std::function<Status()> run;
};

/// Operations in the order in which they were issued: one valid order of the graph that CUDA would build.
struct Graph {
    std::vector<Operation> operations;

    Status run() const;
};

class Stream;

struct Capture {
    std::unique_ptr<Graph> graph = std::make_unique<Graph>();
    Stream* origin = nullptr;
    std::vector<Stream*> members;
    /// Why the capture can no longer succeed; ok while it can.
    Status invalid;
};

/// One recording of an event. Those who wait for the event hold on to the recording, which may be superseded.
struct Recording {
    Stream* stream = nullptr;
    bool reached = false;
    std::chrono::steady_clock::time_point time;
    /// While capturing: the capture, and how much of the stream's work the event covers.
    std::shared_ptr<Capture> capture;
    size_t position = 0;
};

struct Event {
    bool timed = true;
    /// The latest recording; nullptr before the first.
    std::shared_ptr<Recording> recording;

    /// Waits for the recording. An event never recorded is complete.
    Status synchronize() const;
    /// Whether the recording has been reached; in deferred mode asking moves the stream on by one operation.
    Status query() const;
};

class Stream {
  public:
    /// A blocking stream waits for the legacy default stream and the other way round.
    explicit Stream(bool blocking) : blocking_(blocking) {}

    Status submit(Operation operation);

    /// Runs everything queued. Not allowed while capturing.
    Status synchronize();

    Status record(Event& event);
    Status wait(const Event& event);

    Status begin_capture();
    Status end_capture(std::unique_ptr<Graph>* graph);
    bool capturing() const { return capture_ != nullptr; }
    bool capture_invalid() const { return capture_ && !capture_->invalid.ok(); }

    /// Fails, and spoils the capture, if the stream is being captured: for what CUDA forbids meanwhile.
    Status refuse_capture(const char* call);

    bool blocking() const { return blocking_; }
    bool idle() const { return queue_.empty(); }

    /// Runs queued operations until `recording` is reached.
    Status run_until(const Recording& recording);
    Status run_one();

  private:
    Status drain();
    Status join(const std::shared_ptr<Capture>& capture);

    bool blocking_;
    std::deque<Operation> queue_;
    std::shared_ptr<Capture> capture_;
    /// While capturing: operations issued here, and whether the origin has yet to wait for the latest.
    size_t position_ = 0;
    bool unjoined_ = false;
};

Handles<Stream>& streams();
Handles<Event>& events();
Handles<Graph>& graphs();

/// Stream behind a handle; the null handle and the two special ones are the default stream.
Status find_stream(void* handle, Stream** stream);

/// Waits for all streams.
Status synchronize_all();

/// Fails if any stream is being captured.
Status refuse_any_capture(const char* call);

} // namespace host
