// influence_fast._native: checks what Python hands over, lets go of the GIL, calls the plain C++ beside this file.
// numpy arrays in and out; no torch is included or linked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>

#include "cuda/bind.h"
#include "dispatch.h"
#include "quantize.h"
#include "ranks.h"
#include "score.h"

namespace py = pybind11;
using namespace influence_fast;

namespace {

// Asks for signals (Ctrl-C) a few times a second on the calling thread; the GIL is not taken more often than that.
Poll signal_poll() {
  return [last = std::chrono::steady_clock::now()]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(50)) return false;
    last = now;
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  };
}

void check_signals(bool complete) {
  if (!complete) throw py::error_already_set();
}

[[noreturn]] void fail(const std::string& what) { throw py::value_error(what); }

std::string shape_of(const py::array& a) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + ")";
}

// A 2-D array whose rows are contiguous; `itemsize` divides the address and the row stride.
void check_matrix(const py::array& a, const char* name, char kind, py::ssize_t itemsize, bool write) {
  if (a.dtype().kind() != kind || a.itemsize() != itemsize || a.dtype().byteorder() == '>')
    fail(std::string(name) + " has dtype " + std::string(py::str(a.dtype())) + "; expected " + std::to_string(itemsize) +
         " bytes of kind '" + kind + "'");
  if (a.ndim() != 2) fail(std::string(name) + " has shape " + shape_of(a) + "; expected two dimensions");
  if (a.size() > 0 && a.shape(1) > 1 && a.strides(1) != itemsize)
    fail(std::string(name) + " is not contiguous along its rows; pass np.ascontiguousarray(" + name + ")");
  if (reinterpret_cast<uintptr_t>(a.data()) % static_cast<uintptr_t>(itemsize) != 0 ||
      (a.shape(0) > 1 && a.strides(0) % itemsize != 0))
    fail(std::string(name) + " is not aligned to its elements; pass a copy");
  if (write && !a.writeable()) fail(std::string(name) + " is read-only");
}

void check_shape(const py::array& a, const char* name, int64_t rows, int64_t columns) {
  if (a.shape(0) != rows || a.shape(1) != columns)
    fail(std::string(name) + " has shape " + shape_of(a) + "; expected (" + std::to_string(rows) + ", " +
         std::to_string(columns) + ")");
}

DType dtype_of(const py::array& rows) {
  const char kind = rows.dtype().kind();
  if (kind == 'f' && rows.itemsize() == 4) return DType::f32;
  if (kind == 'u' && rows.itemsize() == 2) return DType::bf16;
  if (kind == 'i' && rows.itemsize() == 1) return DType::i8;
  fail("rows have dtype " + std::string(py::str(rows.dtype())) + "; expected float32, uint16 (bf16 bits) or int8");
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "int8") return DType::i8;
  fail("unknown dtype '" + name + "'; known: bfloat16, float32, int8");
}

int64_t stride_of(const py::array& a) { return a.shape(0) > 1 ? a.strides(0) : a.shape(1) * a.itemsize(); }

using Index = py::array_t<int64_t, py::array::c_style>;

// A CSR list of lists, checked against the number of queries.
Groups groups_of(const Index& begin, const Index& query, int64_t queries) {
  if (begin.ndim() != 1 || query.ndim() != 1 || begin.shape(0) < 1) fail("groups must be two flat index arrays");
  const int64_t count = begin.shape(0) - 1;
  if (begin.at(0) != 0 || begin.at(count) != query.shape(0)) fail("group offsets do not span their indices");
  for (int64_t g = 0; g < count; ++g)
    if (begin.at(g) > begin.at(g + 1)) fail("group offsets decrease");
  for (py::ssize_t i = 0; i < query.shape(0); ++i)
    if (query.at(i) < 0 || query.at(i) >= queries) fail("a group names a query that does not exist");
  return Groups{count, begin.data(), query.data()};
}

std::shared_ptr<Queries> pack_queries(const py::array& values, const std::string& rows, bool high,
                                      const std::string& isa, int threads) {
  check_matrix(values, "queries", 'f', 4, false);
  const Kernel kernel = kernel_for(find_isa(isa), dtype_named(rows));
  const DType dtype = dtype_named(rows);
  std::shared_ptr<Queries> packed;
  {
    const py::gil_scoped_release free;
    packed = std::make_shared<Queries>(static_cast<const float*>(values.data()), values.shape(0), values.shape(1),
                                       stride_of(values) / 4, dtype, high, kernel, std::max(1, threads), signal_poll());
  }
  check_signals(packed->complete);
  return packed;
}

std::vector<int64_t> score(const Queries& queries, const py::array& rows, const py::object& scales, int64_t start,
                           bool normalize, const py::object& scores, const py::object& columns,
                           const py::object& group_sums, const Index& group_begin, const Index& group_query,
                           TopK* topk, int threads) {
  const DType dtype = dtype_of(rows);
  check_matrix(rows, "rows", rows.dtype().kind(), rows.itemsize(), false);
  if (dtype != queries.rows) fail("rows have another dtype than the queries were packed for");
  if (rows.shape(1) != queries.k)
    fail("rows have " + std::to_string(rows.shape(1)) + " columns, queries " + std::to_string(queries.k));
  if (start < 0) fail("start is negative");
  Rows in{static_cast<const char*>(rows.data()), rows.shape(0), rows.shape(1), stride_of(rows), dtype, nullptr, start};
  if (!scales.is_none()) {
    const auto a = py::cast<py::array>(scales);
    if (a.dtype().kind() != 'f' || a.itemsize() != 4 || a.ndim() != 1 || a.shape(0) != rows.shape(0) ||
        (a.shape(0) > 1 && a.strides(0) != 4) || reinterpret_cast<uintptr_t>(a.data()) % 4 != 0)
      fail("row_scales must be contiguous float32, one a row");
    in.scales = static_cast<const float*>(a.data());
  }
  Outputs out;
  out.normalize = normalize;
  if (!scores.is_none()) {
    auto a = py::cast<py::array>(scores);
    check_matrix(a, "out", 'f', 4, true);
    check_shape(a, "out", in.count, queries.count);
    out.scores = static_cast<float*>(a.mutable_data());
    out.scores_stride = stride_of(a) / 4;
  }
  if (!columns.is_none()) {
    auto a = py::cast<py::array>(columns);
    check_matrix(a, "columns", 'f', 4, true);
    if (a.shape(0) != queries.count || start + in.count > a.shape(1)) fail("columns do not hold these rows");
    out.columns = static_cast<float*>(a.mutable_data());
    out.columns_stride = stride_of(a) / 4;
  }
  if (!group_sums.is_none()) {
    auto a = py::cast<py::array>(group_sums);
    check_matrix(a, "group_sums", 'f', 8, true);
    out.groups = groups_of(group_begin, group_query, queries.count);
    check_shape(a, "group_sums", in.count, out.groups.count);
    out.group_sums = static_cast<double*>(a.mutable_data());
    out.group_stride = stride_of(a) / 8;
  }
  if (topk && (topk->queries() != queries.count || topk->threads() < threads)) fail("topk was made for other queries");
  out.topk = topk;
  bool complete = true;
  std::vector<int64_t> bad;
  {
    const py::gil_scoped_release free;
    bad = score_rows(queries, in, out, threads, signal_poll(), complete);
  }
  check_signals(complete);
  return bad;
}

void rank(py::array columns, const Index& group_begin, const Index& group_query, py::array sums, int threads) {
  check_matrix(columns, "columns", 'f', 4, true);
  check_matrix(sums, "sums", 'f', 8, true);
  const int64_t count = columns.shape(0), rows = columns.shape(1);
  const Groups groups = groups_of(group_begin, group_query, count);
  check_shape(sums, "sums", rows, groups.count);
  if (stride_of(columns) != rows * 4 || stride_of(sums) != groups.count * 8) fail("columns and sums must be contiguous");
  if (rows >= (int64_t{1} << 31)) fail("ranks need fewer than 2^31 rows");
  auto* data = static_cast<float*>(columns.mutable_data());
  auto* to = static_cast<double*>(sums.mutable_data());
  bool complete;
  {
    const py::gil_scoped_release free;
    complete = rank_columns(data, count, rows, threads, signal_poll()) &&
               add_ranks(reinterpret_cast<const uint32_t*>(data), rows, groups, to, threads, signal_poll());
  }
  check_signals(complete);
}

py::tuple quantize(const py::array& rows, bool stochastic, uint32_t key0, uint32_t key1, int64_t first_row,
                   int threads) {
  check_matrix(rows, "rows", 'f', 4, false);
  const int64_t count = rows.shape(0), k = rows.shape(1);
  py::array_t<int8_t> quantized({count, k});
  py::array_t<float> scales(count);
  auto* q = quantized.mutable_data();
  auto* s = scales.mutable_data();
  bool complete = true;
  std::vector<int64_t> bad;
  {
    const py::gil_scoped_release free;
    Rounding rounding;
    rounding.stochastic = stochastic;
    rounding.key[0] = key0;
    rounding.key[1] = key1;
    rounding.first_row = first_row;
    bad = quantize_rows(static_cast<const float*>(rows.data()), count, k, stride_of(rows) / 4, rounding, q, s, threads,
                        signal_poll(), complete);
  }
  check_signals(complete);
  return py::make_tuple(quantized, scales, bad);
}

py::array bf16(const py::array& values, int threads) {
  check_matrix(values, "values", 'f', 4, false);
  py::array_t<uint16_t> out({values.shape(0), values.shape(1)});
  auto* to = out.mutable_data();
  bool complete;
  {
    const py::gil_scoped_release free;
    complete = convert_bf16(static_cast<const float*>(values.data()), values.shape(0), values.shape(1),
                            stride_of(values) / 4, to, threads, signal_poll());
  }
  check_signals(complete);
  return out;
}

py::dict build_config() {
  py::dict config;
  py::list available;
  py::dict paths;
  for (const Isa& isa : available_isas()) {
    available.append(isa.name);
    py::dict path;
    path["float32"] = panel_name(isa.f32.panel);
    path["bfloat16"] = panel_name(isa.bf16.panel);
    path["int8"] = panel_name(isa.i8.panel);
    paths[isa.name] = path;
  }
  config["compiled"] = py::cast(compiled_isas());
  config["available"] = available;
  config["paths"] = paths;
  config["compiler"] = IF_COMPILER;
  config["cuda"] = cuda::config();
  return config;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Batched inner products, ranks and quantisation; use influence_fast.inner_products.";

  py::class_<Queries, std::shared_ptr<Queries>>(m, "Queries")
      .def(py::init(&pack_queries), py::arg("values"), py::arg("rows"), py::arg("high") = false, py::arg("isa") = "",
           py::arg("threads") = 1)
      .def_readonly("count", &Queries::count)
      .def_readonly("terms", &Queries::terms)
      .def_readonly("tiled", &Queries::tiled);

  py::class_<TopK>(m, "TopK")
      .def(py::init([](int64_t queries, int64_t k, int threads) {
             if (queries < 0 || k < 1 || threads < 1) fail("topk needs k >= 1");
             return TopK(queries, k, threads);
           }),
           py::arg("queries"), py::arg("k"), py::arg("threads") = 1)
      .def("result", [](const TopK& topk) {
        py::array_t<float> values({topk.queries(), topk.k()});
        py::array_t<int64_t> rows({topk.queries(), topk.k()});
        topk.result(values.mutable_data(), rows.mutable_data());
        return py::make_tuple(values, rows);
      });

  m.def("score", &score, py::arg("queries"), py::arg("rows"), py::arg("scales") = py::none(), py::arg("start") = 0,
        py::arg("normalize") = false, py::arg("scores") = py::none(), py::arg("columns") = py::none(),
        py::arg("group_sums") = py::none(), py::arg("group_begin") = Index(0), py::arg("group_query") = Index(0),
        py::arg("topk") = nullptr, py::arg("threads") = 1);
  m.def("rank", &rank, py::arg("columns"), py::arg("group_begin"), py::arg("group_query"), py::arg("sums"),
        py::arg("threads") = 1);
  m.def("quantize", &quantize, py::arg("rows"), py::arg("stochastic"), py::arg("key0"), py::arg("key1"),
        py::arg("first_row"), py::arg("threads") = 1);
  m.def("to_bf16", &bf16, py::arg("values"), py::arg("threads") = 1);
  m.def("build_config", &build_config);
  cuda::bind(m);
  m.def("best_isa", [](const std::string& isa) { return std::string(find_isa(isa).name); }, py::arg("isa") = "");
}
