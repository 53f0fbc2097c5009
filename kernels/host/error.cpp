#include "error.hpp"

#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <set>

#include "settings.hpp"

namespace host {
namespace {

std::string format_text(const char* format, va_list arguments) {
    va_list measured;
    va_copy(measured, arguments);
    const int length = vsnprintf(nullptr, 0, format, measured);
    va_end(measured);
    std::string result(size_t(length), '\0');
    vsnprintf(result.data(), result.size() + 1, format, arguments);
    return result;
}

/// Keeps one copy of each message for ever: callers of cuGetErrorString hold on to the pointer.
const char* keep(const std::string& message) {
    static std::mutex mutex;
    static auto& messages = *new std::set<std::string>;
    std::lock_guard lock(mutex);
    return messages.insert(message).first->c_str();
}

thread_local Code last_code = Code::success;
thread_local const char* last_message = "";

struct CodeText {
    Code code;
    const char* name;
    const char* description;
};

constexpr CodeText code_texts[] = {
    {Code::success, "CUDA_SUCCESS", "no error"},
    {Code::invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {Code::out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {Code::not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {Code::invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {Code::invalid_image, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {Code::invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {Code::invalid_source, "CUDA_ERROR_INVALID_SOURCE", "device kernel source is invalid"},
    {Code::file_not_found, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {Code::invalid_handle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {Code::illegal_state, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in this state"},
    {Code::not_found, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {Code::not_ready, "CUDA_ERROR_NOT_READY", "device not ready"},
    {Code::illegal_address, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {Code::launch_out_of_resources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {Code::assert_failed, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {Code::illegal_instruction, "CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"},
    {Code::misaligned_address, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {Code::invalid_address_space, "CUDA_ERROR_INVALID_ADDRESS_SPACE",
     "operation not supported on global/shared address space"},
    {Code::launch_failed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {Code::not_supported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {Code::capture_unsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {Code::capture_invalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {Code::capture_merge, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {Code::capture_unmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {Code::capture_unjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {Code::capture_isolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {Code::captured_event, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {Code::unknown, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const CodeText* find(int code) {
    for (const CodeText& entry : code_texts)
        if (int(entry.code) == code) return &entry;
    return nullptr;
}

} // namespace

std::string text(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string result = format_text(format, arguments);
    va_end(arguments);
    return result;
}

Status failure(Code code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    Status status{code, format_text(format, arguments)};
    va_end(arguments);
    return status;
}

int report(const Status& status) {
    if (!status.ok()) {
        last_code = status.code;
        last_message = keep(status.message);
        if (settings().print_errors) fprintf(stderr, "effnetv2 host device: %s\n", last_message);
    }
    return int(status.code);
}

const char* last_error_message() { return last_message; }

const char* last_error_message(Code code) {
    return code == last_code && last_message[0] != '\0' ? last_message : nullptr;
}

const char* code_name(int code) {
    const CodeText* entry = find(code);
    return entry ? entry->name : nullptr;
}

const char* code_description(int code) {
    const CodeText* entry = find(code);
    return entry ? entry->description : nullptr;
}

} // namespace host
