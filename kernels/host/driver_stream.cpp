// Driver API: streams, events, capture and graphs.

#include "driver.hpp"
#include "stream.hpp"

using namespace host;

namespace {

constexpr unsigned stream_non_blocking = 1;
constexpr unsigned event_disable_timing = 2;
constexpr unsigned capture_none = 0, capture_active = 1, capture_spoiled = 2;
constexpr unsigned long long instantiate_on_device = 4;

/// What cuGraphInstantiate makes of a graph: here the same operations, apart from the graph's own life.
struct GraphExecutable {
    Graph graph;
};

Handles<GraphExecutable>& executables() {
    static auto& instance = *new Handles<GraphExecutable>("executable graph");
    return instance;
}

Status find_event(void* handle, Event** event) { return events().find(handle, event); }

Status elapsed(float* milliseconds, void* start_handle, void* end_handle) {
    Event* start = nullptr;
    Event* end = nullptr;
    Status status = find_event(start_handle, &start);
    if (status.ok()) status = find_event(end_handle, &end);
    if (!status.ok()) return status;
    for (const Event* event : {start, end}) {
        if (!event->timed) return failure(Code::invalid_handle, "the event was created without timing");
        if (!event->recording) return failure(Code::invalid_handle, "the event was never recorded");
        if (event->recording->capture)
            return failure(Code::captured_event, "the event was recorded in a capture");
        if (!event->recording->reached) return failure(Code::not_ready, "the event has not been reached yet");
    }
    const std::chrono::duration<float, std::milli> span = end->recording->time - start->recording->time;
    return store(milliseconds, span.count());
}

} // namespace

HOST_API int cuStreamCreate(void** stream, unsigned flags) {
    ApiLock lock;
    const bool blocking = (flags & stream_non_blocking) == 0;
    return report(store(stream, static_cast<void*>(streams().add(std::make_unique<Stream>(blocking)))));
}

HOST_API int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}

HOST_API int cuStreamDestroy_v2(void* handle) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = streams().find(handle, &stream);
    if (status.ok()) status = stream->refuse_capture("destroying a stream");
    if (!status.ok()) return report(status);
    status = stream->synchronize();
    Status removed = streams().remove(handle);
    return report(status.ok() ? removed : status);
}

HOST_API int cuStreamSynchronize(void* handle) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    return report(status.ok() ? stream->synchronize() : status);
}

HOST_API int cuStreamQuery(void* handle) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    if (status.ok()) status = stream->refuse_capture("querying a stream");
    if (status.ok()) status = stream->run_one();
    if (status.ok() && !stream->idle()) status = failure(Code::not_ready, "the stream has work left");
    return report(status);
}

HOST_API int cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned) {
    ApiLock lock;
    Stream* stream = nullptr;
    Event* event = nullptr;
    Status status = find_stream(stream_handle, &stream);
    if (status.ok()) status = find_event(event_handle, &event);
    return report(status.ok() ? stream->wait(*event) : status);
}

HOST_API int cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    if (status.ok())
        status = stream->submit({"host function", [=] {
                                     function(data);
                                     return success();
                                 }});
    return report(status);
}

HOST_API int cuEventCreate(void** event, unsigned flags) {
    ApiLock lock;
    auto created = std::make_unique<Event>();
    created->timed = (flags & event_disable_timing) == 0;
    return report(store(event, static_cast<void*>(events().add(std::move(created)))));
}

HOST_API int cuEventDestroy_v2(void* event) {
    ApiLock lock;
    return report(events().remove(event));
}

HOST_API int cuEventRecord(void* event_handle, void* stream_handle) {
    ApiLock lock;
    Stream* stream = nullptr;
    Event* event = nullptr;
    Status status = find_stream(stream_handle, &stream);
    if (status.ok()) status = find_event(event_handle, &event);
    return report(status.ok() ? stream->record(*event) : status);
}

HOST_API int cuEventSynchronize(void* handle) {
    ApiLock lock;
    Event* event = nullptr;
    Status status = find_event(handle, &event);
    return report(status.ok() ? event->synchronize() : status);
}

HOST_API int cuEventQuery(void* handle) {
    ApiLock lock;
    Event* event = nullptr;
    Status status = find_event(handle, &event);
    return report(status.ok() ? event->query() : status);
}

HOST_API int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    ApiLock lock;
    return report(elapsed(milliseconds, start, end));
}

HOST_API int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

HOST_API int cuStreamBeginCapture_v2(void* handle, unsigned) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    return report(status.ok() ? stream->begin_capture() : status);
}

HOST_API int cuStreamEndCapture(void* handle, void** graph) {
    ApiLock lock;
    Stream* stream = nullptr;
    std::unique_ptr<Graph> captured;
    Status status = store(graph, static_cast<void*>(nullptr));
    if (status.ok()) status = find_stream(handle, &stream);
    if (status.ok()) status = stream->end_capture(&captured);
    if (status.ok()) *graph = graphs().add(std::move(captured));
    return report(status);
}

HOST_API int cuStreamIsCapturing(void* handle, unsigned* state) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    if (!status.ok()) return report(status);
    const unsigned capturing = stream->capture_invalid() ? capture_spoiled : capture_active;
    return report(store(state, stream->capturing() ? capturing : capture_none));
}

HOST_API int cuGraphInstantiateWithFlags(void** executable, void* handle, unsigned long long flags) {
    ApiLock lock;
    Graph* graph = nullptr;
    Status status = graphs().find(handle, &graph);
    if (status.ok() && (flags & instantiate_on_device))
        status = failure(Code::invalid_value, "the host device cannot launch graphs from kernels");
    if (!status.ok()) return report(status);
    auto made = std::make_unique<GraphExecutable>(GraphExecutable{*graph});
    return report(store(executable, static_cast<void*>(executables().add(std::move(made)))));
}

HOST_API int cuGraphUpload(void* executable, void*) {
    ApiLock lock;
    GraphExecutable* found = nullptr;
    return report(executables().find(executable, &found));
}

HOST_API int cuGraphLaunch(void* executable, void* stream_handle) {
    ApiLock lock;
    GraphExecutable* found = nullptr;
    Stream* stream = nullptr;
    Status status = executables().find(executable, &found);
    if (status.ok()) status = find_stream(stream_handle, &stream);
    if (status.ok()) status = stream->submit({"graph", [graph = found->graph] { return graph.run(); }});
    return report(status);
}

/// The number of nodes; the nodes themselves have no handles here.
HOST_API int cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
    ApiLock lock;
    Graph* graph = nullptr;
    Status status = graphs().find(handle, &graph);
    if (status.ok() && nodes != nullptr)
        status =
            failure(Code::not_supported, "graph nodes of the host device cannot be listed, only counted");
    return report(status.ok() ? store(count, graph->operations.size()) : status);
}

HOST_API int cuGraphExecDestroy(void* executable) {
    ApiLock lock;
    return report(executables().remove(executable));
}

HOST_API int cuGraphDestroy(void* graph) {
    ApiLock lock;
    return report(graphs().remove(graph));
}
