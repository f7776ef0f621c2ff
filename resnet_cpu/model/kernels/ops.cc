// TensorFlow operations around the loops of loops.h: batch norm with what follows it, and the update of the weights.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "blocks.h"
#include "loops.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace resnet_cpu {
namespace {

using tensorflow::DataType;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::errors::InvalidArgument;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// --- instruction sets ------------------------------------------------------------------------------------------------

struct InstructionSet {
  const char* name;
  bool available;
  const Loops* float32;
  const Loops* bfloat16;
};

// From the widest to the narrowest that the compiler knew.
std::vector<InstructionSet> instruction_sets() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef HAS_AVX512BF16
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return {
#ifdef HAS_AVX512BF16
      {"avx512_bf16", bf16, &kAvx512Bf16Float, &kAvx512Bf16Bfloat16},
#endif
      {"avx512", avx512, &kAvx512Float, &kAvx512Bfloat16},
      {"avx2", avx2, &kAvx2Float, &kAvx2Bfloat16}};
}

// The widest that this processor has and that RESNET_CPU_KERNELS_ISA, if it is set, allows; else null.
const InstructionSet* chosen() {
  static const std::vector<InstructionSet> sets = instruction_sets();
  const char* limit = std::getenv("RESNET_CPU_KERNELS_ISA");
  bool allowed = limit == nullptr || *limit == '\0';
  for (const InstructionSet& set : sets) {
    allowed = allowed || std::strcmp(limit, set.name) == 0;
    if (allowed && set.available) return &set;
  }
  return nullptr;
}

const Loops* loops_for(DataType type) {
  const InstructionSet* set = chosen();
  if (set == nullptr) return nullptr;
  return type == tensorflow::DT_FLOAT ? set->float32 : set->bfloat16;
}

// --- threads ---------------------------------------------------------------------------------------------------------

// Calls body(0) ... body(count - 1), each once, on this thread and those of TensorFlow's pool.
void for_blocks(OpKernelContext* context, int64_t count, const std::function<void(int64_t)>& body) {
  const auto* pool = context->device()->tensorflow_cpu_worker_threads();
  const auto schedule = [pool](const std::function<void()>& work) { pool->workers->Schedule(work); };
  resnet_cpu::for_blocks(pool->num_threads, schedule, count, body);
}

// --- batch norm ------------------------------------------------------------------------------------------------------

// What both directions know of their input: images [batch, height, width, channels] in groups of whole images.
struct Shape {
  int64_t groups, rows, channels;  // rows: of one group

  int64_t elements() const { return rows * channels; }
};

tensorflow::Status shape_of(const Tensor& x, int64_t groups, Shape* shape) {
  if (x.dims() != 4) return InvalidArgument("x has the shape ", x.shape().DebugString(), ", not four dimensions");
  if (x.dim_size(0) % groups != 0 || x.NumElements() == 0) {
    return InvalidArgument(x.dim_size(0), " images cannot be divided into ", groups, " groups that are not empty");
  }
  *shape = {groups, x.NumElements() / x.dim_size(3) / groups, x.dim_size(3)};
  return tensorflow::Status();
}

tensorflow::Status check_vector(const char* name, const Tensor& tensor, int64_t size) {
  if (tensor.NumElements() == size) return tensorflow::Status();
  return InvalidArgument(name, " has ", tensor.NumElements(), " elements, not ", size);
}

tensorflow::Status check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  if (tensor.shape() == x.shape()) return tensorflow::Status();
  return InvalidArgument(name, " has the shape ", tensor.shape().DebugString(), ", x ", x.shape().DebugString());
}

// The options that both directions share.
class NormKernel : public OpKernel {
 public:
  explicit NormKernel(OpKernelConstruction* context) : OpKernel(context) {
    DataType type;
    OP_REQUIRES_OK(context, context->GetAttr("T", &type));
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
    OP_REQUIRES_OK(context, context->GetAttr("groups", &groups_));
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    int sides, copies;
    OP_REQUIRES_OK(context, context->GetAttr("sides", &sides));
    OP_REQUIRES_OK(context, context->GetAttr("copies", &copies));
    OP_REQUIRES(context, sides <= 1 && copies <= 2,
                InvalidArgument("there can be one side input and two copies, not ", sides, " and ", copies));
    element_ = tensorflow::DataTypeSize(type);
    loops_ = loops_for(type);
    OP_REQUIRES(context, loops_ != nullptr,
                tensorflow::errors::Unimplemented("this processor has no AVX2 with FMA, or RESNET_CPU_KERNELS_ISA "
                                                  "does not allow what it has"));
  }

 protected:
  // Adds `elements` to a pointer to elements of the input's type; null stays null.
  template <typename Pointer>
  Pointer* at(Pointer* start, int64_t elements) const {
    using Byte = std::conditional_t<std::is_const<Pointer>::value, const char, char>;
    return start ? static_cast<Byte*>(start) + elements * element_ : nullptr;
  }

  // scale[c] = gamma[c] / sqrt(variance[c] + epsilon), and 1 / sqrt(variance[c] + epsilon) to `inverse`.
  void scales(const float* gamma, const float* variance, int64_t channels, std::vector<float>* scale,
              std::vector<double>* inverse) const {
    scale->resize(channels);
    inverse->resize(channels);
    for (int64_t c = 0; c < channels; ++c) {
      (*inverse)[c] = 1.0 / std::sqrt(static_cast<double>(variance[c]) + epsilon_);
      (*scale)[c] = static_cast<float>(gamma[c] * (*inverse)[c]);
    }
  }

  const Loops* loops_;
  bool relu_;
  int64_t groups_, element_;
  float epsilon_;
};

class BatchNormOp : public NormKernel {
 public:
  using NormKernel::NormKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& x = context->input(0);
    const Tensor& gamma = context->input(1);
    const Tensor& beta = context->input(2);
    tensorflow::OpInputList side;
    tensorflow::OpOutputList y;
    OP_REQUIRES_OK(context, context->input_list("side", &side));
    OP_REQUIRES_OK(context, context->output_list("y", &y));
    Shape shape;
    OP_REQUIRES_OK(context, shape_of(x, groups_, &shape));
    OP_REQUIRES_OK(context, check_vector("gamma", gamma, shape.channels));
    OP_REQUIRES_OK(context, check_vector("beta", beta, shape.channels));
    if (side.size()) OP_REQUIRES_OK(context, check_like("side", side[0], x));

    Tensor *mean, *variance, *out;
    const TensorShape of_groups({groups_, shape.channels});
    OP_REQUIRES_OK(context, y.allocate(0, x.shape(), &out));
    for (int copy = 1; copy < y.size(); ++copy) y.set(copy, *out);
    OP_REQUIRES_OK(context, context->allocate_output("mean", of_groups, &mean));
    OP_REQUIRES_OK(context, context->allocate_output("variance", of_groups, &variance));
    const Blocks blocks(shape.rows, shape.channels);
    Tensor sums;
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_FLOAT,
                                                   TensorShape({blocks.count, 2 * shape.channels}), &sums));
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t start = group * shape.elements();
      run(context, shape, blocks, at(x.data(), start), side.size() ? at(side[0].data(), start) : nullptr,
          at(out->data(), start), gamma.flat<float>().data(), beta.flat<float>().data(), sums.flat<float>().data(),
          mean->flat<float>().data() + group * shape.channels,
          variance->flat<float>().data() + group * shape.channels);
    }
  }

 private:
  void run(OpKernelContext* context, const Shape& shape, const Blocks& blocks, const void* x, const void* side, void* y,
           const float* gamma, const float* beta, float* sums, float* mean, float* variance) const {
    const int64_t channels = shape.channels;
    std::vector<double> total;
    std::vector<float> shift(channels), scale;
    std::vector<double> inverse;
    // The sums are taken around a value near the mean, since the difference of two large sums of squares is not exact.
    const std::vector<float> zeros(channels, 0.0f);
    std::vector<float> sample(2 * channels);
    const int64_t sampled = std::min<int64_t>(shape.rows, 16);
    loops_->moments(x, sampled, channels, zeros.data(), sample.data());
    for (int64_t c = 0; c < channels; ++c) shift[c] = sample[c] / sampled;
    for_blocks(context, blocks.count, [&](int64_t block) {
      loops_->moments(at(x, blocks.first(block) * channels), blocks.length(block), channels, shift.data(),
                      sums + block * 2 * channels);
    });
    add_up(sums, blocks.count, channels, &total);
    for (int64_t c = 0; c < channels; ++c) {
      const double first = total[c] / shape.rows, second = total[channels + c] / shape.rows;
      mean[c] = static_cast<float>(shift[c] + first);
      const double spread = second - first * first;
      variance[c] = static_cast<float>(spread < 0 ? 0.0 : spread);  // NaN stays NaN
    }
    scales(gamma, variance, channels, &scale, &inverse);
    const Channels with{mean, scale.data(), beta};
    for_blocks(context, blocks.count, [&](int64_t block) {
      const int64_t start = blocks.first(block) * channels;
      loops_->normalize(at(x, start), at(side, start), at(y, start), blocks.length(block), channels, with, relu_);
    });
  }
};

class BatchNormGradOp : public NormKernel {
 public:
  using NormKernel::NormKernel;

  void Compute(OpKernelContext* context) override {
    tensorflow::OpInputList dy, y;
    tensorflow::OpOutputList dside;
    OP_REQUIRES_OK(context, context->input_list("dy", &dy));
    OP_REQUIRES_OK(context, context->input_list("y", &y));
    OP_REQUIRES_OK(context, context->output_list("dside", &dside));
    const int after = dy.size();
    const Tensor& x = context->input(after);
    const Tensor& gamma = context->input(after + 1);
    const Tensor& beta = context->input(after + 2);
    const Tensor& mean = context->input(after + 3);
    const Tensor& variance = context->input(after + 4);
    Shape shape;
    OP_REQUIRES_OK(context, shape_of(x, groups_, &shape));
    for (const Tensor& gradient : dy) OP_REQUIRES_OK(context, check_like("dy", gradient, x));
    for (const Tensor& output : y) OP_REQUIRES_OK(context, check_like("y", output, x));
    OP_REQUIRES_OK(context, check_vector("gamma", gamma, shape.channels));
    OP_REQUIRES_OK(context, check_vector("beta", beta, shape.channels));
    OP_REQUIRES_OK(context, check_vector("mean", mean, groups_ * shape.channels));
    OP_REQUIRES_OK(context, check_vector("variance", variance, groups_ * shape.channels));
    OP_REQUIRES(context, dside.size() == 0 || !relu_ || y.size() == 1,
                InvalidArgument("with a side input, the mask of the ReLU comes from y, which is missing"));

    // An incoming gradient that nothing else needs becomes the result: less memory to touch.
    Tensor *masked = nullptr, *dx = nullptr, *dgamma, *dbeta;
    std::vector<int> candidates;
    for (int i = 0; i < dy.size(); ++i) candidates.push_back(i);
    const int of_dx = 0, of_dside = 3;
    if (dside.size()) {
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(candidates, of_dside, x.shape(), &masked));
      std::vector<int> others;
      for (int i : candidates) {
        if (!masked->SharesBufferWith(dy[i])) others.push_back(i);
      }
      candidates = others;
    }
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(candidates, of_dx, x.shape(), &dx));
    OP_REQUIRES_OK(context, context->allocate_output("dgamma", gamma.shape(), &dgamma));
    OP_REQUIRES_OK(context, context->allocate_output("dbeta", gamma.shape(), &dbeta));
    const Blocks blocks(shape.rows, shape.channels);
    Tensor sums;
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_FLOAT,
                                                   TensorShape({blocks.count, 2 * shape.channels}), &sums));
    std::vector<double> gradients(2 * shape.channels, 0.0);  // of beta, then of gamma
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t start = group * shape.elements();
      const Incoming incoming{at(dy[0].data(), start), dy.size() > 1 ? at(dy[1].data(), start) : nullptr,
                              y.size() ? at(y[0].data(), start) : nullptr, relu_};
      run(context, shape, blocks, incoming, at(x.data(), start), masked ? at(masked->data(), start) : nullptr,
          at(dx->data(), start), gamma.flat<float>().data(), beta.flat<float>().data(),
          mean.flat<float>().data() + group * shape.channels,
          variance.flat<float>().data() + group * shape.channels, sums.flat<float>().data(), &gradients);
    }
    for (int64_t c = 0; c < shape.channels; ++c) {
      dbeta->flat<float>()(c) = static_cast<float>(gradients[c]);
      dgamma->flat<float>()(c) = static_cast<float>(gradients[shape.channels + c]);
    }
  }

 private:
  void run(OpKernelContext* context, const Shape& shape, const Blocks& blocks, const Incoming& dy, const void* x,
           void* masked, void* dx, const float* gamma, const float* beta, const float* mean, const float* variance,
           float* sums, std::vector<double>* gradients) const {
    const int64_t channels = shape.channels;
    std::vector<float> scale, constant(channels), slope(channels);
    std::vector<double> inverse, total;
    scales(gamma, variance, channels, &scale, &inverse);
    const Channels with{mean, scale.data(), beta};
    const auto shifted = [&](int64_t start) {
      return Incoming{at(dy.first, start), at(dy.second, start), at(dy.output, start), dy.relu};
    };
    for_blocks(context, blocks.count, [&](int64_t block) {
      const int64_t start = blocks.first(block) * channels;
      loops_->reduce(shifted(start), at(x, start), at(masked, start), blocks.length(block), channels, with,
                     sums + block * 2 * channels);
    });
    add_up(sums, blocks.count, channels, &total);
    for (int64_t c = 0; c < channels; ++c) {
      const double dbeta = total[c], dgamma = total[channels + c] * inverse[c];
      (*gradients)[c] += dbeta;
      (*gradients)[channels + c] += dgamma;
      constant[c] = static_cast<float>(scale[c] * dbeta / shape.rows);
      slope[c] = static_cast<float>(scale[c] * inverse[c] * dgamma / shape.rows);
    }
    const Coefficients of{constant.data(), slope.data()};
    for_blocks(context, blocks.count, [&](int64_t block) {
      const int64_t start = blocks.first(block) * channels;
      const Incoming rest = masked ? Incoming{at(masked, start), nullptr, nullptr, false} : shifted(start);
      loops_->backward(rest, at(x, start), at(dx, start), blocks.length(block), channels, with, of);
    });
  }
};

REGISTER_OP("ResnetCpuBatchNorm")
    .Input("x: T")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("side: sides * T")
    .Output("y: copies * T")
    .Output("mean: float")
    .Output("variance: float")
    .Attr("T: {float, bfloat16}")
    .Attr("sides: int >= 0")
    .Attr("copies: int >= 1 = 1")
    .Attr("relu: bool")
    .Attr("groups: int >= 1 = 1")
    .Attr("epsilon: float")
    .SetShapeFn([](InferenceContext* context) -> tensorflow::Status {
      ShapeHandle x;
      int copies, groups;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &x));
      TF_RETURN_IF_ERROR(context->GetAttr("copies", &copies));
      TF_RETURN_IF_ERROR(context->GetAttr("groups", &groups));
      for (int copy = 0; copy < copies; ++copy) context->set_output(copy, x);
      const ShapeHandle of_groups = context->Matrix(groups, context->Dim(x, 3));
      context->set_output(copies, of_groups);
      context->set_output(copies + 1, of_groups);
      return tensorflow::Status();
    });

REGISTER_OP("ResnetCpuBatchNormGrad")
    .Input("dy: copies * T")
    .Input("x: T")
    .Input("gamma: float")
    .Input("beta: float")
    .Input("mean: float")
    .Input("variance: float")
    .Input("y: outputs * T")
    .Output("dx: T")
    .Output("dgamma: float")
    .Output("dbeta: float")
    .Output("dside: sides * T")
    .Attr("T: {float, bfloat16}")
    .Attr("sides: int >= 0")
    .Attr("outputs: int >= 0")
    .Attr("copies: int >= 1 = 1")
    .Attr("relu: bool")
    .Attr("groups: int >= 1 = 1")
    .Attr("epsilon: float")
    .SetShapeFn([](InferenceContext* context) -> tensorflow::Status {
      int copies, sides;
      TF_RETURN_IF_ERROR(context->GetAttr("copies", &copies));
      TF_RETURN_IF_ERROR(context->GetAttr("sides", &sides));
      context->set_output(0, context->input(copies));
      context->set_output(1, context->input(copies + 1));
      context->set_output(2, context->input(copies + 2));
      for (int side = 0; side < sides; ++side) context->set_output(3 + side, context->input(copies));
      return tensorflow::Status();
    });

REGISTER_KERNEL_BUILDER(Name("ResnetCpuBatchNorm").Device(tensorflow::DEVICE_CPU), BatchNormOp);
REGISTER_KERNEL_BUILDER(Name("ResnetCpuBatchNormGrad").Device(tensorflow::DEVICE_CPU), BatchNormGradOp);

// --- the update of the weights ---------------------------------------------------------------------------------------

// Momentum SGD with weight decay, see resnet_cpu/optim/sgd.py, for all variables at once.
class MomentumOp : public OpKernel {
 public:
  explicit MomentumOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("N", &count_));
    OP_REQUIRES_OK(context, context->GetAttr("decays", &decays_));
    OP_REQUIRES_OK(context, context->GetAttr("nesterov", &nesterov_));
    OP_REQUIRES(context, static_cast<int>(decays_.size()) == count_,
                InvalidArgument("decays has ", decays_.size(), " entries for ", count_, " variables"));
    loops_ = loops_for(tensorflow::DT_FLOAT);
    OP_REQUIRES(context, loops_ != nullptr, tensorflow::errors::Unimplemented("this processor has no AVX2 with FMA"));
  }

  void Compute(OpKernelContext* context) override {
    std::vector<Pair> pairs(count_);
    const float rate = context->input(3 * count_).scalar<float>()();
    const float decay = context->input(3 * count_ + 1).scalar<float>()();
    const float momentum = context->input(3 * count_ + 2).scalar<float>()();
    std::vector<Piece> pieces;
    for (int i = 0; i < count_; ++i) {
      OP_REQUIRES_OK(context, LookupResource(context, tensorflow::HandleFromInput(context, i), &pairs[i].weight));
      OP_REQUIRES_OK(context,
                     LookupResource(context, tensorflow::HandleFromInput(context, count_ + i), &pairs[i].velocity));
      const Tensor& gradient = context->input(2 * count_ + i);
      float *weight, *velocity;
      // One step at a time uses these variables, and Keras' own update takes no lock either.
      OP_REQUIRES_OK(context, writable(context, pairs[i].weight->tensor(), gradient, &weight));
      OP_REQUIRES_OK(context, writable(context, pairs[i].velocity->tensor(), gradient, &velocity));
      constexpr int64_t kPiece = 65536;
      for (int64_t start = 0; start < gradient.NumElements(); start += kPiece) {
        pieces.push_back({weight + start, velocity + start, gradient.flat<float>().data() + start,
                          std::min(kPiece, gradient.NumElements() - start), decays_[i] ? decay : 0.0f});
      }
    }
    for_blocks(context, pieces.size(), [&](int64_t number) {
      const Piece& piece = pieces[number];
      loops_->momentum(piece.weight, piece.velocity, piece.gradient, piece.count, rate, piece.decay, momentum,
                       nesterov_);
    });
  }

 private:
  struct Pair {
    tensorflow::core::RefCountPtr<tensorflow::Var> weight, velocity;
  };
  struct Piece {
    float* weight;
    float* velocity;
    const float* gradient;
    int64_t count;
    float decay;
  };

  // Gives the memory of a variable for writing; a buffer that somebody else still reads is replaced by a copy.
  static tensorflow::Status writable(OpKernelContext* context, Tensor* tensor, const Tensor& gradient, float** memory) {
    if (tensor->dtype() != tensorflow::DT_FLOAT || tensor->shape() != gradient.shape()) {
      return InvalidArgument("a variable is not float32 of the shape of its gradient, ",
                             gradient.shape().DebugString());
    }
    if (!tensor->RefCountIsOne()) {
      Tensor copy;
      TF_RETURN_IF_ERROR(context->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
      std::memcpy(copy.data(), tensor->data(), tensor->TotalBytes());
      *tensor = copy;
    }
    *memory = tensor->flat<float>().data();
    return tensorflow::Status();
  }

  int count_;
  bool nesterov_;
  std::vector<bool> decays_;
  const Loops* loops_;
};

REGISTER_OP("ResnetCpuMomentum")
    .Input("weights: N * resource")
    .Input("velocities: N * resource")
    .Input("gradients: N * float")
    .Input("rate: float")
    .Input("decay: float")
    .Input("momentum: float")
    .Attr("N: int >= 1")
    .Attr("decays: list(bool)")
    .Attr("nesterov: bool")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_KERNEL_BUILDER(Name("ResnetCpuMomentum").Device(tensorflow::DEVICE_CPU), MomentumOp);

}  // namespace
}  // namespace resnet_cpu

// The name of the instruction set that the operations use; empty where they cannot run.
extern "C" const char* resnet_cpu_kernels_isa() {
  const resnet_cpu::InstructionSet* set = resnet_cpu::chosen();
  return set ? set->name : "";
}
