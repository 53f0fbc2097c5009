#include "stream.hpp"

#include "settings.hpp"

namespace host {
namespace {

Stream& default_stream() {
    static auto& stream = *new Stream(true);
    return stream;
}

/// CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
constexpr uintptr_t special_handles = 2;

Status first_failure(Status first, Status second) { return first.ok() ? second : first; }

template <class Visit> void for_each_stream(Visit visit) {
    visit(default_stream());
    streams().for_each(visit);
}

/// The legacy default stream is a barrier between blocking streams.
Status synchronize_with_default(Stream& stream) {
    if (!stream.blocking() || !settings().defer) return success();
    if (&stream != &default_stream())
        return default_stream().idle() ? success() : default_stream().synchronize();
    Status status;
    for_each_stream([&](Stream& other) {
        if (other.blocking() && !other.capturing() && &other != &stream && !other.idle())
            status = first_failure(std::move(status), other.synchronize());
    });
    return status;
}

} // namespace

Status Graph::run() const {
    for (const Operation& operation : operations) {
        Status status = operation.run();
        if (!status.ok()) return status;
    }
    return success();
}

Status Event::synchronize() const {
    if (!recording) return success();
    if (recording->capture)
        return failure(Code::captured_event,
                       "an event recorded during a capture cannot be waited for by the host");
    return recording->reached ? success() : recording->stream->run_until(*recording);
}

Status Event::query() const {
    if (!recording || recording->reached) return success();
    if (recording->capture)
        return failure(Code::captured_event, "an event recorded during a capture cannot be queried");
    Status status = recording->stream->run_one();
    if (!status.ok()) return status;
    return recording->reached ? success() : failure(Code::not_ready, "the event has not been reached yet");
}

Status Stream::submit(Operation operation) {
    if (capture_) {
        capture_->graph->operations.push_back(std::move(operation));
        ++position_;
        unjoined_ = this != capture_->origin;
        return success();
    }
    Status status = synchronize_with_default(*this);
    if (!settings().defer && queue_.empty()) return first_failure(std::move(status), operation.run());
    queue_.push_back(std::move(operation));
    return status;
}

Status Stream::run_one() {
    if (queue_.empty()) return success();
    const Operation operation = std::move(queue_.front());
    queue_.pop_front();
    return operation.run();
}

Status Stream::drain() {
    Status status;
    while (!queue_.empty()) status = first_failure(std::move(status), run_one());
    return status;
}

Status Stream::run_until(const Recording& recording) {
    Status status;
    while (!recording.reached && !queue_.empty()) status = first_failure(std::move(status), run_one());
    return status;
}

Status Stream::synchronize() {
    Status status = refuse_capture("waiting for a stream");
    return status.ok() ? drain() : status;
}

Status Stream::record(Event& event) {
    auto recording = std::make_shared<Recording>();
    recording->stream = this;
    event.recording = recording;
    if (capture_) {
        recording->capture = capture_;
        recording->position = position_;
        return success();
    }
    return submit({"event", [recording] {
                       recording->time = std::chrono::steady_clock::now();
                       recording->reached = true;
                       return success();
                   }});
}

Status Stream::wait(const Event& event) {
    const std::shared_ptr<Recording> recording = event.recording;
    if (!recording) return success();
    if (recording->capture) {
        if (recording->capture->origin == nullptr)
            return failure(Code::captured_event, "the event belongs to a capture that has ended");
        Status status = join(recording->capture);
        if (!status.ok()) return status;
        Stream& other = *recording->stream;
        if (&other != this && other.position_ == recording->position) other.unjoined_ = false;
        return success();
    }
    if (capture_) {
        capture_->invalid =
            failure(Code::capture_isolation,
                    "a captured stream waits for an event that was recorded outside of the capture");
        return capture_->invalid;
    }
    if (recording->reached) return success();
    return submit({"wait", [recording] { return recording->stream->run_until(*recording); }});
}

Status Stream::join(const std::shared_ptr<Capture>& capture) {
    if (capture_ == capture) return success();
    if (capture_) return failure(Code::capture_merge, "a stream cannot take part in two captures at once");
    capture_ = capture;
    capture_->members.push_back(this);
    position_ = 0;
    unjoined_ = true;
    return success();
}

Status Stream::begin_capture() {
    if (capture_) return failure(Code::illegal_state, "the stream is already being captured");
    if (this == &default_stream())
        return failure(Code::capture_unsupported,
                       "the default stream cannot be captured: create one of your own");
    Status status = drain();
    if (!status.ok()) return status;
    auto capture = std::make_shared<Capture>();
    capture->origin = this;
    status = join(capture);
    unjoined_ = false;
    return status;
}

Status Stream::end_capture(std::unique_ptr<Graph>* graph) {
    if (!capture_) return failure(Code::illegal_state, "the stream is not being captured");
    if (capture_->origin != this)
        return failure(Code::capture_unmatched, "the capture was begun on another stream and must end there");
    const std::shared_ptr<Capture> capture = std::move(capture_);
    bool unjoined = false;
    for (Stream* member : capture->members) {
        unjoined |= member->unjoined_;
        member->unjoined_ = false;
        member->capture_ = nullptr;
    }
    capture->origin = nullptr;
    if (!capture->invalid.ok())
        return failure(Code::capture_invalidated, "the capture failed earlier: %s",
                       capture->invalid.message.c_str());
    if (unjoined)
        return failure(Code::capture_unjoined,
                       "another stream took part in the capture, and the stream that began it "
                       "does not wait for the other's last work");
    *graph = std::move(capture->graph);
    return success();
}

Status Stream::refuse_capture(const char* call) {
    if (!capture_) return success();
    Status refused =
        failure(Code::capture_unsupported, "%s is not possible while the stream is being captured", call);
    if (capture_->invalid.ok()) capture_->invalid = refused;
    return refused;
}

Handles<Stream>& streams() {
    static auto& instance = *new Handles<Stream>("stream");
    return instance;
}

Handles<Event>& events() {
    static auto& instance = *new Handles<Event>("event");
    return instance;
}

Handles<Graph>& graphs() {
    static auto& instance = *new Handles<Graph>("graph");
    return instance;
}

Status find_stream(void* handle, Stream** stream) {
    if (reinterpret_cast<uintptr_t>(handle) <= special_handles) {
        *stream = &default_stream();
        return success();
    }
    return streams().find(handle, stream);
}

Status synchronize_all() {
    Status status = refuse_any_capture("waiting for the whole device");
    if (!status.ok()) return status;
    for_each_stream([&](Stream& stream) { status = first_failure(std::move(status), stream.synchronize()); });
    return status;
}

Status refuse_any_capture(const char* call) {
    Status status;
    for_each_stream(
        [&](Stream& stream) { status = first_failure(std::move(status), stream.refuse_capture(call)); });
    return status;
}

} // namespace host
