// The interface between Python and the kernels: one structure for the arguments of each exported function.
//
// native/interface.py declares the same structures. The library reports how this file was compiled (`taipan_interface`);
// loading compares the two. A field that is missing, moved or of another type is an error, not overwritten memory.
#pragma once

#include "layout.h"
#include "simd.h"

namespace taipan {

using Real = TAIPAN_REAL;  // of sums, states and statistics

// ------------------------------------------------------------------ ops
//
// void* points to Real, or to bfloat16 if `narrow`. Sizes and strides count elements. Fields that may be null say so.

// N and P are multiples of the vector width; within a token, heads and groups are contiguous.
struct SsdSizes {
  Index batch, tokens, heads, head_dim, groups, state, chunk;
  Index x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, narrow;
};

struct SsdInputs {
  const void* x;
  const Real *dt, *A;
  const void *B, *C;
  const Real *D, *initial;        // may be null
  const std::int32_t* document;   // running number of the document of each token, or null
  Real *scores, *B_rows, *C_rows;  // work space that the heads of a group share
  Real* entrances;  // states at the entrances of the chunks, for the backward: (batch, heads, chunks, N, P); or null
};

struct SsdForward {
  SsdSizes sizes;
  SsdInputs inputs;
  void* y;
  Real* final;
};

struct SsdBackward {
  SsdSizes sizes;
  SsdInputs inputs;
  Real *B_columns, *C_columns;
  const void* dy;
  Index dy_t;  // from token to token; dx may be dy
  const Real* dfinal;  // may be null
  Real *slices_dB, *slices_dC, *slices_dscores;
  Index slices, dx_t;  // and from token to token of dx
  void* dx;
  Real* ddt;
  Index dB_t;  // of dB and dC
  void *dB, *dC;
  Real* dinitial;
  double *dA, *dD;
};

struct ConvSizes {
  Index batch, tokens, channels, taps, x_b, x_t, silu, narrow;
};

struct ConvInputs {
  const void* x;
  const Real *weight, *bias;      // (K, C), (C)
  const Real* columns;            // (B, K - 1, C), or null for zeros
  const std::int32_t* document;   // (B, T): running number of the document, 0 that of the columns; or null
};

struct ConvForward {
  ConvSizes sizes;
  ConvInputs inputs;
  void* y;
};

struct ConvBackward {
  ConvSizes sizes;
  ConvInputs inputs;
  const void* dy;
  Index dy_t, dx_t;  // from token to token; dx may be dy
  void* dx;
  Real *dcolumns, *dtaps;
};

struct NormSizes {
  Index rows, channels, group, y_row, z_row, narrow;
};

struct NormForward {
  NormSizes sizes;
  double eps;
  const void *y, *z;  // z may be null
  const Real* weight;
  void* out;
};

struct NormBackward {
  NormSizes sizes;
  double eps;
  const void *y, *z;  // z may be null, and then dz
  const Real* weight;
  const void* dout;
  Index dy_row;
  void* dy;
  Index dz_row;
  void* dz;
  Real* dweight;  // (threads, C)
};

// What lies between the projections of a Mamba-2 mixer. C channels are convolved: x (inner), then B and C.
struct Mamba2Sizes {
  Index batch, tokens, heads, head_dim, groups, state, chunk, taps, proj_row, narrow;  // proj_row: from token to token
  double eps;
};

struct Mamba2Inputs {
  const void* proj;  // (B, T, inner + C + heads): z, the channels, dt
  const Real *weight, *bias, *dt, *A, *D, *norm;  // weight (C, K), dt (B, T, heads)
  const Real *columns, *initial;  // of the convolution and the state; may be null
  const std::int32_t* document;   // as above, or null
  // What the forward writes and the backward reads: (K, C), (B, T, C), (B, T, inner).
  Real* taps;
  void *xbc, *y;
  Real *scores, *B_rows, *C_rows, *entrances;  // as above
};

struct Mamba2Forward {
  Mamba2Sizes sizes;
  Mamba2Inputs inputs;
  void* out;
  Real* final;
};

struct Mamba2Backward {
  Mamba2Sizes sizes;
  Mamba2Inputs inputs;
  const void* dout;
  const Real* dfinal;  // may be null
  // Work space, as above.
  Real *B_columns, *C_columns, *slices_dB, *slices_dC, *slices_dscores;
  Index slices;
  // Results, each as the kernel of its part gives it; of dproj all but what belongs to dt.
  void* dproj;
  Real *dtaps, *dcolumns, *ddt;
  double *dA, *dD;
  Real *dinitial, *dnorm;
};

struct Outranking {
  Index batch, tokens, reach;
  const Real* scores;            // (batch, reach + tokens)
  const std::int32_t* document;  // (batch, tokens): running number of the document, 0 that of what was before; or null
  std::int64_t* counts;          // (batch, tokens)
};

// bfloat16 whatever Real is; `count` elements, a multiple of 16.
struct SwigluForward {
  Index count;
  const void *gate, *up;
  void* out;
};

struct SwigluBackward {
  Index count;
  const void *gate, *up, *dout;
  void *dgate, *dup;
};

// The residual stream in Real; its branch and the normed result may be narrow. All contiguous.
struct NormSumSizes {
  Index rows, channels, narrow_branch, narrow_out;
};

struct NormSumForward {
  NormSumSizes sizes;
  double eps;
  const Real* x;
  const void* branch;
  const Real* weight;
  Real* total;
  void* out;
};

struct NormSumBackward {
  NormSumSizes sizes;
  double eps;
  const Real *total, *weight;
  const void* dout;
  const Real* dtotal;  // may be null
  Real* dx;
  void* dbranch;
  Real* dweight;  // (threads, C)
};

// Strides of rows, tokens and heads.
struct AttentionSizes {
  Index batch, queries, keys, heads, groups, width, narrow, slices;
  Index known_blocks, known_columns;  // as the caller allocated
  Index q[3], k[3], v[3], out[3], dout[3];
};

// Per row of the batch: indices of the present keys, of the queries that see any, and each query's range of keys.
struct AttentionPlan {
  std::int32_t *key, *query, *first, *stop;
  std::int32_t* counts;  // (B, 3): such keys and queries, and parts of their gradients
  std::int32_t* bounds;  // (B, blocks, 4)
  std::int32_t* until;   // number of the first query that does not see a key any more; null: no key leaves by itself
};

struct AttentionPlanned {
  AttentionSizes sizes;
  const std::int64_t *low, *high, *code;
  const std::int64_t* until;  // code from which on no query sees a key; may be null, as in the plan
  AttentionPlan plan;
};

struct AttentionForward {
  AttentionSizes sizes;
  const void *q, *k, *v;
  AttentionPlan plan;
  void* out;
  Real* statistics;
};

struct AttentionBackward {
  AttentionSizes sizes;
  const void *q, *k, *v;
  AttentionPlan plan;
  const void *out, *dout;
  Real *statistics, *delta, *parts_dq;
  void *dq, *dk, *dv;
};

// logits (rows, columns) contiguous; targets in range.
struct CrossEntropy {
  Index rows, columns, narrow, learns;  // learns: the logits become the gradient
  void* logits;
  const std::int64_t* target;
  double* loss;
};

// One parameter; moments as codes, with a scale for each block of so many elements. The step is
// parameter · shrink − rate · first / (√second · root + eps).
struct AdamW {
  Index count, block;
  Real* parameter;
  const Real* gradient;
  std::int8_t* first;
  std::uint8_t* second;  // codes of the root
  float *first_scale, *second_scale;
  double beta1, beta2, shrink, rate, root, eps;
};

// A matrix (rows, columns), contiguous, with what its step is multiplied by.
struct MuonMatrix {
  Index rows, columns;
  Real* parameter;
  const Real* gradient;
  Real* momentum;
  double rate;
};

// momentum · keep + gradient · (1 − keep); `iterations` of a, b, c; parameter · shrink − rate · step.
struct Muon {
  const MuonMatrix* matrices;
  Index count, iterations;
  double keep, a, b, c, shrink;
};

// ------------------------------------------------------------------ decoding

enum Format : Index { kReal = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

// (rows, columns), one row after the other; of int4 in tiles, as int4.h has them. Scales are fp32, one for each row, of
// int8, and bfloat16, one for each group of each row, of int4; else null.
struct Matrix {
  const void* weight;
  const void* scale;
  Index rows, columns;
};

struct DecodeSizes {
  Index layers, hidden, vocabulary, intermediate;
  Index inner, conv, taps, heads, head_dim, groups, state;  // of Mamba-2
  Index query_heads, key_heads, width;                       // of attention
  Index gate_hidden;                                         // 0: a linear gate
  Index lookahead;                                           // K of the selective layers
  Index orders, remembered, window, rank;                    // of gates that recall; 0: none does
  Index scores, bounding;  // that selective layers remember; the last ones of them, to select few of those; 0: none
  Index format, embedding_format;                            // of the matrices and of the embedding
  Index rounds;  // the model is in bfloat16: states are rounded to it, operands of products may be
  double eps, dt_low, dt_high;
  double most;  // of the bounding scores may be higher
};

enum Kind : Index { kMamba2 = 0, kAttention = 1, kSelective = 2, kClosed = 3 };

struct Layer {
  Index kind;
  const Real* norm;
  Matrix first, keys, values, last;  // in_proj, -, -, out_proj; or q_proj, k_proj, v_proj, o_proj
  const Real *conv_weight, *conv_bias;  // (K, C), (C)
  const Real *dt_bias, *A, *D;          // (H); A is negative
  const Real* gated_norm;
  const Real* frequency;  // (E / 2) of the rotary embedding, or null
  Index window;           // 0: none
  const Real *gate_weight, *gate_bias, *gate_hidden_weight, *gate_hidden_bias;
  const Real *recall_query_weight, *recall_query_bias, *recall_key_weight, *recall_key_bias;  // or null
  const Real* threshold;
  Index gate_reads_raw, keys_of_all, counts_selected, adds, weighs_one;
  Index recent;  // newest entries that stay where the weakest leaves; 0: the oldest leaves
  const Real* mlp_norm;  // null: no MLP
  Matrix gate, up, down;
};

// Of a Mamba-2 layer: columns (B, K - 1, C), recurrent state (B, H, P, N), and where it may be tokens behind, what those
// bring (B, most_behind · (H P + G N + H)). Of an attention layer: keys and values
// (B, G, W, E), window coordinate (B, W) and number of entries so far (B); where entries look ahead, the last inputs
// (B, K, D); where the share selected is bounded, the last scores (B, scores); where the weakest entry leaves, the
// strengths (B, W).
struct State {
  Real *first, *second, *late, *recent, *scores, *strength;
  std::int64_t *index, *count;
  Index slots;
};

// `rows` are the `count` of the batch that get a token; `tokens`, `position` and `recent` (B, R) are of the whole batch,
// `logits` (count, V) of those rows. The recurrent states of a row are `behind` (B) tokens behind, at most `most_behind`.
// `orders` are the lengths of the n-grams that are recalled, rising.
struct Decode {
  DecodeSizes sizes;
  const Layer* layers;
  const State* states;
  Matrix head, embedding;
  const Real* norm;
  Index batch, count, most_behind;
  const std::int64_t *rows, *tokens;
  std::int64_t *position, *behind;
  const std::int64_t* orders;  // may be null, and then `recent`
  std::int64_t* recent;
  Real* logits;
};

// The recurrent states of the `count` rows of `decode` catch up; no token is read.
struct Settle {
  Decode decode;
};

// How a token is chosen from logits; `sample` 0: the likeliest. Applied in this order, as in generation/sampling.py.
struct Choice {
  Index sample;
  double penalty, temperature;  // the penalty only where tokens seen are given
  Index top_k;                  // 0: all
  double top_p, min_p;
  const std::int64_t* excluded;  // ids that are never chosen; may be null if there are none
  Index excluded_count;
};

// A token of every row of logits (rows, columns); -1 where there is none that could be chosen.
struct Choose {
  Choice how;
  Index rows, columns;
  const Real* logits;
  const std::uint8_t* seen;  // (rows, columns), or null
  const double* uniform;     // of each row, in [0, 1); may be null if nothing is drawn
  std::int64_t* tokens;
};

// How one row writes.
struct Pen {
  Choice how;
  const std::int64_t* ends;  // may be null if there are none
  Index end_count;
  std::uint8_t* seen;     // (vocabulary), or null
  const double* uniform;  // of each step; may be null if nothing is drawn
};

// Several tokens of each of the `count` rows of `decode`: those of `next` (batch) are read, if they are `unread`, the ones
// after them chosen from the logits, read, and so on. Ends behind one of a row's `ends`, behind -1, after `steps`, and at
// the next step once `halt` is set. The last tokens, which are in `next` then, are not read.
// Another thread may watch: `written` counts the steps whose `tokens` (steps, count) are there, and a byte goes into the
// file `signal` (-1: none) behind each, unless `signalled` says that one is on its way.
struct Write {
  Decode decode;
  const Pen* pens;
  Index steps, unread;
  std::int64_t *next, *tokens, *written;
  const std::int64_t* halt;  // may be null
  Index signal;
  std::int64_t* signalled;  // may be null without a signal
};

// A piece of memory to digest.
struct Piece {
  const void* address;
  Index bytes;
};

struct Digest {
  const Piece* pieces;
  Index count;
  std::int64_t* result;
};

struct Unpack {
  Matrix matrix;
  Index narrow;  // to bfloat16
  void* out;     // (rows, columns)
};

// ------------------------------------------------------------------ as they are described

TAIPAN_STRUCT(SsdSizes, batch, tokens, heads, head_dim, groups, state, chunk, x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t,
              narrow)
TAIPAN_STRUCT(SsdInputs, x, dt, A, B, C, D, initial, document, scores, B_rows, C_rows, entrances)
TAIPAN_STRUCT(SsdForward, sizes, inputs, y, final)
TAIPAN_STRUCT(SsdBackward, sizes, inputs, B_columns, C_columns, dy, dy_t, dfinal, slices_dB, slices_dC, slices_dscores,
              slices, dx_t, dx, ddt, dB_t, dB, dC, dinitial, dA, dD)
TAIPAN_STRUCT(ConvSizes, batch, tokens, channels, taps, x_b, x_t, silu, narrow)
TAIPAN_STRUCT(ConvInputs, x, weight, bias, columns, document)
TAIPAN_STRUCT(ConvForward, sizes, inputs, y)
TAIPAN_STRUCT(ConvBackward, sizes, inputs, dy, dy_t, dx_t, dx, dcolumns, dtaps)
TAIPAN_STRUCT(NormSizes, rows, channels, group, y_row, z_row, narrow)
TAIPAN_STRUCT(NormForward, sizes, eps, y, z, weight, out)
TAIPAN_STRUCT(NormBackward, sizes, eps, y, z, weight, dout, dy_row, dy, dz_row, dz, dweight)
TAIPAN_STRUCT(Mamba2Sizes, batch, tokens, heads, head_dim, groups, state, chunk, taps, proj_row, narrow, eps)
TAIPAN_STRUCT(Mamba2Inputs, proj, weight, bias, dt, A, D, norm, columns, initial, document, taps, xbc, y, scores, B_rows, C_rows,
              entrances)
TAIPAN_STRUCT(Mamba2Forward, sizes, inputs, out, final)
TAIPAN_STRUCT(Mamba2Backward, sizes, inputs, dout, dfinal, B_columns, C_columns, slices_dB, slices_dC, slices_dscores,
              slices, dproj, dtaps, dcolumns, ddt, dA, dD, dinitial, dnorm)
TAIPAN_STRUCT(Outranking, batch, tokens, reach, scores, document, counts)
TAIPAN_STRUCT(SwigluForward, count, gate, up, out)
TAIPAN_STRUCT(SwigluBackward, count, gate, up, dout, dgate, dup)
TAIPAN_STRUCT(NormSumSizes, rows, channels, narrow_branch, narrow_out)
TAIPAN_STRUCT(NormSumForward, sizes, eps, x, branch, weight, total, out)
TAIPAN_STRUCT(NormSumBackward, sizes, eps, total, weight, dout, dtotal, dx, dbranch, dweight)
TAIPAN_STRUCT(AttentionSizes, batch, queries, keys, heads, groups, width, narrow, slices, known_blocks, known_columns, q,
              k, v, out, dout)
TAIPAN_STRUCT(AttentionPlan, key, query, first, stop, counts, bounds, until)
TAIPAN_STRUCT(AttentionPlanned, sizes, low, high, code, until, plan)
TAIPAN_STRUCT(AttentionForward, sizes, q, k, v, plan, out, statistics)
TAIPAN_STRUCT(AttentionBackward, sizes, q, k, v, plan, out, dout, statistics, delta, parts_dq, dq, dk, dv)
TAIPAN_STRUCT(CrossEntropy, rows, columns, narrow, learns, logits, target, loss)
TAIPAN_STRUCT(AdamW, count, block, parameter, gradient, first, second, first_scale, second_scale, beta1, beta2, shrink,
              rate, root, eps)
TAIPAN_STRUCT(MuonMatrix, rows, columns, parameter, gradient, momentum, rate)
TAIPAN_STRUCT(Muon, matrices, count, iterations, keep, a, b, c, shrink)
TAIPAN_STRUCT(Matrix, weight, scale, rows, columns)
TAIPAN_STRUCT(DecodeSizes, layers, hidden, vocabulary, intermediate, inner, conv, taps, heads, head_dim, groups, state,
              query_heads, key_heads, width, gate_hidden, lookahead, orders, remembered, window, rank, scores,
              bounding, format, embedding_format, rounds, eps, dt_low, dt_high, most)
TAIPAN_STRUCT(Layer, kind, norm, first, keys, values, last, conv_weight, conv_bias, dt_bias, A, D, gated_norm, frequency,
              window, gate_weight, gate_bias, gate_hidden_weight, gate_hidden_bias, recall_query_weight,
              recall_query_bias, recall_key_weight, recall_key_bias, threshold, gate_reads_raw, keys_of_all,
              counts_selected, adds, weighs_one, recent, mlp_norm, gate, up, down)
TAIPAN_STRUCT(State, first, second, late, recent, scores, strength, index, count, slots)
TAIPAN_STRUCT(Decode, sizes, layers, states, head, embedding, norm, batch, count, most_behind, rows, tokens, position,
              behind, orders, recent, logits)
TAIPAN_STRUCT(Settle, decode)
TAIPAN_STRUCT(Choice, sample, penalty, temperature, top_k, top_p, min_p, excluded, excluded_count)
TAIPAN_STRUCT(Choose, how, rows, columns, logits, seen, uniform, tokens)
TAIPAN_STRUCT(Pen, how, ends, end_count, seen, uniform)
TAIPAN_STRUCT(Write, decode, pens, steps, unread, next, tokens, written, halt, signal, signalled)
TAIPAN_STRUCT(Piece, address, bytes)
TAIPAN_STRUCT(Digest, pieces, count, result)
TAIPAN_STRUCT(Unpack, matrix, narrow, out)

}  // namespace taipan

// Every function: arguments and number of threads in, a Status out.
#define TAIPAN_FUNCTION(name, Arguments) extern "C" int taipan_##name(const taipan::Arguments* call, int threads)
#define TAIPAN_FUNCTIONS(F)                  \
  F(ssd_forward, SsdForward)                 \
  F(ssd_backward, SsdBackward)               \
  F(conv_forward, ConvForward)               \
  F(conv_backward, ConvBackward)             \
  F(norm_forward, NormForward)               \
  F(norm_backward, NormBackward)             \
  F(mamba2_forward, Mamba2Forward)           \
  F(mamba2_backward, Mamba2Backward)         \
  F(outranking, Outranking)                  \
  F(swiglu_forward, SwigluForward)           \
  F(swiglu_backward, SwigluBackward)         \
  F(norm_sum_forward, NormSumForward)        \
  F(norm_sum_backward, NormSumBackward)      \
  F(attention_plan, AttentionPlanned)        \
  F(attention_forward, AttentionForward)     \
  F(attention_backward, AttentionBackward)   \
  F(cross_entropy, CrossEntropy)             \
  F(adamw, AdamW)                            \
  F(muon, Muon)                              \
  F(decode, Decode)                          \
  F(settle, Settle)                          \
  F(choose, Choose)                          \
  F(write, Write)                            \
  F(digest, Digest)                          \
  F(unpack, Unpack)

#define TAIPAN_DECLARE(name, Arguments) TAIPAN_FUNCTION(name, Arguments);
TAIPAN_FUNCTIONS(TAIPAN_DECLARE)
