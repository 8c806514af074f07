#include "bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>

#include "plan.h"
#include "score.h"

namespace py = pybind11;

namespace influence_fast::cuda {
namespace {

#ifdef IF_HAVE_CUDA
std::string why_not() { return unavailable(); }
#else
std::string why_not() { return "influence_fast._native was built without CUDA"; }
#endif

using Index = py::array_t<int64_t, py::array::c_style>;

py::tuple tile_lists(const Index& begin, const Index& query, int64_t queries) {
  const int64_t groups = begin.size() - 1;
  if (groups < 0 || begin.at(0) != 0 || begin.at(groups) != query.size())
    throw py::value_error("group offsets do not span their indices");
  for (int64_t g = 0; g < groups; ++g)
    if (begin.at(g) > begin.at(g + 1)) throw py::value_error("group offsets decrease");
  for (py::ssize_t i = 0; i < query.size(); ++i)
    if (query.at(i) < 0 || query.at(i) >= queries) throw py::value_error("a group names a query that does not exist");
  const TileGroups lists = tile_groups(groups, begin.data(), query.data(), queries);
  py::array_t<int32_t> first({tile_count(queries), groups + 1});
  std::copy(lists.begin.begin(), lists.begin.end(), first.mutable_data());
  py::array_t<int32_t> column(static_cast<py::ssize_t>(lists.column.size()));
  std::copy(lists.column.begin(), lists.column.end(), column.mutable_data());
  return py::make_tuple(first, column);
}

#ifdef IF_HAVE_CUDA
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const Queries& queries, const Rows& rows, const Outputs& out) {
  const int64_t itemsize = queries.integer ? 1 : 2;
  if (queries.terms < 1 || queries.count < 0 || queries.k < 0 || queries.count >= (int64_t{1} << 31))
    throw py::value_error("queries have impossible sizes");
  if (queries.stride % kGranule || reinterpret_cast<uintptr_t>(queries.data) % kGranule ||
      queries.stride < queries.k * itemsize)
    throw py::value_error("queries must be padded to 16 bytes");
  if (rows.count < 0 || reinterpret_cast<uintptr_t>(rows.data) % static_cast<uintptr_t>(itemsize) ||
      rows.stride % itemsize)
    throw py::value_error("rows are not aligned to their elements");
  if (!out.bad || (out.normalize && !out.row_factor)) throw py::value_error("scratch is missing");
  if (out.group_sums && (!out.group_begin || (!out.group_column && out.groups)))
    throw py::value_error("group lists are missing");
}

Queries queries_at(uintptr_t data, uintptr_t factor, int64_t terms, int64_t count, int64_t k, int64_t stride,
                   bool integer) {
  return Queries{pointer<const void>(data), pointer<const float>(factor), terms, count, k, stride, integer};
}

Outputs outputs_at(uintptr_t bad, bool normalize, uintptr_t row_factor, uintptr_t scores, int64_t scores_stride,
                   uintptr_t columns, int64_t columns_stride, uintptr_t group_sums, int64_t group_stride,
                   int64_t groups, uintptr_t group_begin, uintptr_t group_column) {
  Outputs out;
  out.bad = pointer<int32_t>(bad);
  out.normalize = normalize;
  out.row_factor = pointer<float>(row_factor);
  out.scores = pointer<float>(scores);
  out.scores_stride = scores_stride;
  out.columns = pointer<float>(columns);
  out.columns_stride = columns_stride;
  out.group_sums = pointer<double>(group_sums);
  out.group_stride = group_stride;
  out.groups = groups;
  out.group_begin = pointer<const int32_t>(group_begin);
  out.group_column = pointer<const int32_t>(group_column);
  return out;
}

void score_resident(int device, const Queries& queries, uintptr_t rows, int64_t count, int64_t stride,
                    uintptr_t scales, const Outputs& out, uintptr_t stream) {
  const Rows in{pointer<const void>(rows), count, stride, pointer<const float>(scales)};
  check(queries, in, out);
  const py::gil_scoped_release free;
  score(device, queries, in, out, stream);
}

// Host rows as a numpy array; stops for Ctrl-C between two chunks.
void push(Stream& self, const Queries& queries, const py::array& rows, const py::object& scales, const Outputs& out,
          int threads, uintptr_t stream) {
  const int64_t itemsize = queries.integer ? 1 : 2;
  if (rows.ndim() != 2 || rows.shape(1) != queries.k || rows.itemsize() != itemsize ||
      rows.dtype().kind() != (queries.integer ? 'i' : 'u') || (queries.k > 1 && rows.strides(1) != itemsize))
    throw py::value_error("rows do not fit the queries");
  Rows in{rows.data(), rows.shape(0), rows.shape(0) > 1 ? rows.strides(0) : queries.k * itemsize, nullptr};
  if (!scales.is_none()) {
    const auto a = py::cast<py::array>(scales);
    if (a.dtype().kind() != 'f' || a.itemsize() != 4 || a.ndim() != 1 || a.shape(0) != in.count ||
        (in.count > 1 && a.strides(0) != 4))
      throw py::value_error("row_scales must be contiguous float32, one a row");
    in.scales = static_cast<const float*>(a.data());
  }
  check(queries, in, out);
  bool complete;
  {
    const py::gil_scoped_release free;
    complete = self.push(queries, in, out, std::max(1, threads), stream, [] {
      const py::gil_scoped_acquire gil;
      return PyErr_CheckSignals() != 0;
    });
  }
  if (!complete) throw py::error_already_set();
}
#endif

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_why", &why_not, "Why CUDA cannot be used here, or an empty string.");
  m.def("cuda_available", [] { return why_not().empty(); });
  m.def("cuda_tile_columns", &tile_columns, py::arg("queries"));
  m.def("cuda_padded_row", &padded_row, py::arg("bytes"));
  m.def("cuda_chunk_rows", &chunk_rows, py::arg("rows"), py::arg("row_bytes"), py::arg("budget"));
  m.def("cuda_tile_groups", &tile_lists, py::arg("begin"), py::arg("query"), py::arg("queries"));
#ifdef IF_HAVE_CUDA
  py::class_<Queries>(m, "CudaQueries")
      .def(py::init(&queries_at), py::arg("data"), py::arg("factor"), py::arg("terms"), py::arg("count"), py::arg("k"),
           py::arg("stride"), py::arg("integer"));
  py::class_<Outputs>(m, "CudaOutputs")
      .def(py::init(&outputs_at), py::kw_only(), py::arg("bad"), py::arg("normalize") = false,
           py::arg("row_factor") = 0, py::arg("scores") = 0, py::arg("scores_stride") = 0, py::arg("columns") = 0,
           py::arg("columns_stride") = 0, py::arg("group_sums") = 0, py::arg("group_stride") = 0,
           py::arg("groups") = 0, py::arg("group_begin") = 0, py::arg("group_column") = 0);
  py::class_<Stream>(m, "CudaStream")
      .def(py::init<int, int64_t, int64_t>(), py::arg("device"), py::arg("chunk"), py::arg("k_bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def("push", &push, py::arg("queries"), py::arg("rows"), py::arg("scales"), py::arg("out"), py::arg("threads"),
           py::arg("stream"))
      .def("finish", &Stream::finish, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_score", &score_resident, py::arg("device"), py::arg("queries"), py::arg("rows"), py::arg("count"),
        py::arg("stride"), py::arg("scales"), py::arg("out"), py::arg("stream"));
#endif
}

py::dict config() {
  py::dict config;
#ifdef IF_HAVE_CUDA
  config["compiled"] = true;
  config["compiler"] = IF_CUDA_COMPILER;
  config["architectures"] = py::str(IF_CUDA_ARCHITECTURES).attr("split")();
#else
  config["compiled"] = false;
  config["compiler"] = "";
  config["architectures"] = py::list();
#endif
  return config;
}

}  // namespace influence_fast::cuda
