// What the forms of causal attention share: one call of the operator, and its cache.
// The cache is declared as float32 by the graph and holds bfloat16: two positions in the room of one, so that it is half as large and
// read in half the time. nbs/engines/53_attention.ipynb has the formulas and the figures.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAS_FORMS
#endif

struct Call {   // one layer, one call
  int batch, length, heads, groups, d, capacity, turned;   // turned: channels of a half that turn; groups: heads of keys and values
  float scale;
  const float *q, *k, *v, *cosines, *sines;   // (batch, length, …); (context, turned)
  i64 ldq, ldk;                               // from one position to the next
  const int32_t* last;                        // (batch,) last position of each row
  u16 *keys, *values;                         // (batch, groups, capacity, d)
  float* out;                                 // (batch, length, heads·d)
  int wide, longest;                          // d and the most positions of a row, rounded up to `ROUND`
  void *packed_keys, *packed_values;          // (batch·groups, longest·wide) of a form's elements, as it wants them

  int past(int b) const { return last[b] + 1 - length; }
  i64 cache(int b, int g) const { return ((i64)b*groups + g)*capacity*d; }
  int group(int h) const { return h/(heads/groups); }
  i64 packed(int b, int g) const { return ((i64)b*groups + g)*longest*wide; }
};

struct Form {   // a way to compute it
  int queries;                                            // of a block
  size_t element;                                         // bytes of what is packed
  void (*append)(const Call&, int b, int g);              // new keys and values to the cache of one row and group
  void (*pack)(const Call&, int b, int g);                // all of them, for the blocks
  bool (*attend_block)(const Call&, int b, int h, int q0);  // queries from q0 on, of one row and head; false: no memory for it
  bool (*attend_query)(const Call&, int b, int h, int t);   // the query at t, with the cache as it is; false: the same
};
extern const Form TILES, REGISTERS;
extern "C" int ready();   // 0: the tiles can be used
bool has_registers();

namespace {

const int ROUND = 32;            // of channels and positions
const int MOST_CHANNELS = 256;   // per head
const float LOG2E = 1.44269504f;

template <typename T> T* buffer(i64 n) { return (T*)aligned_alloc(64, (n*sizeof(T) + 63)/64*64); }   // nullptr: there is none

// Memory that grows and is kept. nullptr: there is not as much
template <typename T> struct Kept {
  T* x = nullptr;
  i64 size = 0;
  T* of(i64 n) {
    if (n > size) free(x), x = buffer<T>(n), size = x ? n : 0;
    return x;
  }
  ~Kept() { free(x); }
};

// A head at a position, with its two halves turned
inline void turn(const Call& c, const float* x, int position, float* out) {
  const float *co = c.cosines + (i64)position*c.turned, *si = c.sines + (i64)position*c.turned;
  const int n = c.turned;
  for (int i = 0; i < n; i++) {
    const float a = x[i], b = x[i + n];
    out[i] = a*co[i] - b*si[i], out[i + n] = b*co[i] + a*si[i];
  }
  for (int i = 2*n; i < c.d; i++) out[i] = x[i];
}

// To every new position of one row and group: where it goes in the cache, its key and its value
template <typename Store> inline void append_with(const Call& c, int b, int g, Store store) {
  const int past = c.past(b);
  float turned[MOST_CHANNELS];
  for (int t = 0; t < c.length; t++) {
    const i64 from = ((i64)b*c.length + t)*c.ldk + (i64)g*c.d, to = c.cache(b, g) + (i64)(past + t)*c.d;
    const float* k = c.k + from;
    if (c.turned) turn(c, k, past + t, turned), k = turned;
    store(k, c.keys + to);
    store(c.v + from, c.values + to);
  }
}

}  // namespace
