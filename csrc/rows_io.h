// Rows of class centers between a file and memory: one record a row in the file, one array a field in memory.
#pragma once

#include <cstdint>
#include <vector>

namespace fa {

// A field of each record. In memory its rows follow one another.
struct Field {
  char* data;
  int64_t bytes;  // of one row
};

// The fields lie one behind the other at the beginning of each record; a record may hold more behind them.
struct Records {
  int file;
  int64_t record_bytes;
  const int64_t* rows;  // (count,) numbers of the records, each once
  int64_t count;
  std::vector<Field> fields;
};

// Row i of each field is that of record rows[i]. Return 0, or the errno of the first call that failed; other rows may
// have been transferred then.
int read_records(const Records& records, int threads);
int write_records(const Records& records, int threads);

}  // namespace fa
