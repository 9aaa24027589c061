// Positioned reads and writes rather than a mapping: a full disk and a failing one are errors, not signals, and pages
// that were read are no resident memory of this process.
#include "rows_io.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>

namespace fa {
namespace {

constexpr size_t kMostParts = 512;  // of one call; systems allow 1024
constexpr int64_t kWindow = 256;    // rows whose pages the system is told to fetch before the first of them is read

// Transfers parts of memory to or from consecutive bytes of a file. Returns 0 or an errno.
template <typename Call>
int transfer(const Call& call, std::vector<iovec>& parts, off_t offset) {
  size_t first = 0;
  while (first < parts.size()) {
    ssize_t done = call(parts.data() + first, static_cast<int>(parts.size() - first), offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return EIO;  // the file ends before the record does
    offset += done;
    for (; first < parts.size() && static_cast<size_t>(done) >= parts[first].iov_len; ++first)
      done -= static_cast<ssize_t>(parts[first].iov_len);
    if (done > 0) {
      parts[first].iov_base = static_cast<char*>(parts[first].iov_base) + done;
      parts[first].iov_len -= static_cast<size_t>(done);
    }
  }
  return 0;
}

// The rows [begin, end), neighbors in one call where nothing lies between them.
template <typename Call>
int transfer_rows(const Records& records, int64_t begin, int64_t end, const Call& call) {
  int64_t bytes = 0;
  for (const Field& field : records.fields) bytes += field.bytes;
  const bool dense = bytes == records.record_bytes;
  std::vector<iovec> parts;
  for (int64_t i = begin; i < end;) {
    const int64_t first = records.rows[i];
    parts.clear();
    do {
      for (const Field& field : records.fields)
        parts.push_back({field.data + i * field.bytes, static_cast<size_t>(field.bytes)});
      ++i;
    } while (dense && i < end && records.rows[i] == records.rows[i - 1] + 1 &&
             parts.size() + records.fields.size() <= kMostParts);
    const int failed = transfer(call, parts, static_cast<off_t>(first * records.record_bytes));
    if (failed != 0) return failed;
  }
  return 0;
}

void advise([[maybe_unused]] const Records& records, [[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) {
#if defined(__linux__)
  for (int64_t i = begin; i < end; ++i)
    posix_fadvise(records.file, static_cast<off_t>(records.rows[i] * records.record_bytes),
                  static_cast<off_t>(records.record_bytes), POSIX_FADV_WILLNEED);
#endif
}

// Windows of rows on several threads: a disk answers many calls at once.
template <typename Fn>
int for_windows(int64_t count, int threads, const Fn& fn) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    for (int64_t begin = next.fetch_add(kWindow); begin < count && failed == 0; begin = next.fetch_add(kWindow)) {
      const int error = fn(begin, std::min(begin + kWindow, count));
      if (error != 0) failed = error;
    }
  };
  std::vector<std::thread> others;
  const int64_t useful = std::min<int64_t>(threads, (count + kWindow - 1) / kWindow);
  try {
    for (int64_t i = 1; i < useful; ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // no more threads: those at hand do the work
  }
  work();
  for (std::thread& each : others) each.join();
  return failed;
}

}  // namespace

int read_records(const Records& records, int threads) {
  return for_windows(records.count, threads, [&](int64_t begin, int64_t end) {
    advise(records, begin, end);
    return transfer_rows(records, begin, end, [&](const iovec* parts, int count, off_t offset) {
      return preadv(records.file, parts, count, offset);
    });
  });
}

int write_records(const Records& records, int threads) {
  return for_windows(records.count, threads, [&](int64_t begin, int64_t end) {
    return transfer_rows(records, begin, end, [&](const iovec* parts, int count, off_t offset) {
      return pwritev(records.file, parts, count, offset);
    });
  });
}

}  // namespace fa
