//! Where every named tensor lies in the flat buffers.
//!
//! Parameters are one buffer and running statistics another. A tensor is known by its timm name; its values are kept in
//! the order the kernels read ([`ConvKind`]) and given out in PyTorch's order. Every tensor begins at a multiple of
//! [`ALIGNMENT`] elements, so that kernels can read it 16 bytes at a time in any element type. What lies between two
//! tensors belongs to neither: it is zero, its gradient is zero, and so it stays.

use crate::backend::{Classifier, ConvNorm, SqueezeExcite};
use crate::nn::BatchNormSpec;
use crate::tensor::{Conv, ConvKind};
use std::ops::Range;

/// Tensors begin at multiples of this many elements: 16 bytes of f16 or bf16.
pub const ALIGNMENT: usize = 8;

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Weights of a convolution.
    Kernel(Conv),
    /// Weights of a squeeze-excitation layer.
    SqueezeKernel,
    /// Weights of the classifier.
    ClassifierKernel,
    /// Bias of a squeeze-excitation layer or the classifier.
    Bias,
    /// γ of a batch norm.
    Gamma,
    /// β of a batch norm.
    Beta,
    /// Running mean of a batch norm; in the statistics buffer.
    RunningMean,
    /// Running variance of a batch norm; in the statistics buffer.
    RunningVar,
}

impl Role {
    /// Whether weight decay applies: to kernels, never to biases, γ and β.
    pub const fn is_kernel(self) -> bool {
        matches!(self, Self::Kernel(_) | Self::SqueezeKernel | Self::ClassifierKernel)
    }
}

/// One named tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The timm name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Its place in its buffer.
    pub range: Range<usize>,
    /// Its shape in PyTorch.
    pub shape: Vec<usize>,
}

impl Entry {
    /// The place in our order of the value that is `index`-th in PyTorch's.
    fn place(&self, index: usize) -> usize {
        match self.role {
            Role::Kernel(conv) if conv.kind != ConvKind::Pointwise => {
                // PyTorch: [out, in, kh, kw]; a depthwise kernel has one input channel.
                let area = conv.kernel * conv.kernel;
                let (tap, rest) = (index % area, index / area);
                match conv.kind {
                    ConvKind::Depthwise => tap * conv.outputs + rest,
                    _ => (rest / conv.inputs * area + tap) * conv.inputs + rest % conv.inputs,
                }
            }
            _ => index,
        }
    }

    /// The tensor's values in PyTorch's order, out of its whole buffer.
    pub fn to_torch<T: Copy>(&self, buffer: &[T]) -> Vec<T> {
        (0..self.range.len()).map(|i| buffer[self.range.start + self.place(i)]).collect()
    }

    /// Sets the tensor inside its whole buffer from values in PyTorch's order; there must be as many.
    pub fn set_from_torch<T: Copy>(&self, values: impl ExactSizeIterator<Item = T>, buffer: &mut [T]) {
        assert_eq!(values.len(), self.range.len(), "{}: as many values as the tensor has", self.name);
        for (i, value) in values.enumerate() {
            buffer[self.range.start + self.place(i)] = value;
        }
    }
}

/// The length of the buffer that holds these tensors.
fn buffer(table: &[Entry]) -> usize {
    table.last().map_or(0, |entry| entry.range.end.next_multiple_of(ALIGNMENT))
}

/// The tables of both buffers, in forward order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    /// Trainable tensors.
    pub params: Vec<Entry>,
    /// Running statistics.
    pub stats: Vec<Entry>,
}

impl Layout {
    /// The number of parameters.
    pub fn param_count(&self) -> usize {
        self.params.iter().map(|entry| entry.range.len()).sum()
    }

    /// The number of running statistics.
    pub fn stat_count(&self) -> usize {
        self.stats.iter().map(|entry| entry.range.len()).sum()
    }

    /// The length of the parameter buffer.
    pub fn param_buffer(&self) -> usize {
        buffer(&self.params)
    }

    /// The length of the statistics buffer.
    pub fn stat_buffer(&self) -> usize {
        buffer(&self.stats)
    }

    /// The parts of the parameter buffer that weight decay applies to, in order, neighbours joined.
    pub fn decayed(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for entry in self.params.iter().filter(|e| e.role.is_kernel()) {
            match ranges.last_mut() {
                Some(last) if last.end == entry.range.start => last.end = entry.range.end,
                _ => ranges.push(entry.range.clone()),
            }
        }
        ranges
    }

    fn push(&mut self, name: String, role: Role, shape: Vec<usize>) -> Range<usize> {
        let table = match role {
            Role::RunningMean | Role::RunningVar => &mut self.stats,
            _ => &mut self.params,
        };
        let start = buffer(table);
        let range = start..start + shape.iter().product::<usize>();
        table.push(Entry { name, role, range: range.clone(), shape });
        range
    }

    /// Adds a convolution called `conv_name` and its batch norm called `norm_name`.
    pub(super) fn conv_norm(
        &mut self,
        conv_name: &str,
        norm_name: &str,
        conv: Conv,
        norm: &BatchNormSpec,
    ) -> ConvNorm {
        let per_filter = if conv.kind == ConvKind::Depthwise { 1 } else { conv.inputs };
        let shape = vec![conv.outputs, per_filter, conv.kernel, conv.kernel];
        let weight = self.push(format!("{conv_name}.weight"), Role::Kernel(conv), shape);
        let mut channel =
            |suffix: &str, role| self.push(format!("{norm_name}.{suffix}"), role, vec![conv.outputs]);
        ConvNorm {
            conv,
            weight,
            gamma: channel("weight", Role::Gamma),
            beta: channel("bias", Role::Beta),
            running_mean: channel("running_mean", Role::RunningMean),
            running_var: channel("running_var", Role::RunningVar),
            epsilon: norm.epsilon,
            momentum: norm.momentum,
            variance: norm.variance,
        }
    }

    /// Adds a squeeze-excitation called `name`.
    pub(super) fn squeeze_excite(&mut self, name: &str, channels: usize, reduced: usize) -> SqueezeExcite {
        let mut layer = |part: &str, outputs, inputs| {
            let weight =
                self.push(format!("{name}.{part}.weight"), Role::SqueezeKernel, vec![outputs, inputs, 1, 1]);
            (weight, self.push(format!("{name}.{part}.bias"), Role::Bias, vec![outputs]))
        };
        let (reduce_weight, reduce_bias) = layer("conv_reduce", reduced, channels);
        let (expand_weight, expand_bias) = layer("conv_expand", channels, reduced);
        SqueezeExcite { channels, reduced, reduce_weight, reduce_bias, expand_weight, expand_bias }
    }

    /// Adds the classifier.
    pub(super) fn classifier(&mut self, features: usize, classes: usize) -> Classifier {
        let weight = self.push("classifier.weight".into(), Role::ClassifierKernel, vec![classes, features]);
        let bias = self.push("classifier.bias".into(), Role::Bias, vec![classes]);
        Classifier { features, classes, weight, bias }
    }
}

#[cfg(test)]
mod tests {
    use crate::model::Architecture;
    use crate::nn::Network;

    /// Tensors follow each other, each at the next multiple of 8, and the buffers end at one.
    #[test]
    fn tensors_are_aligned_and_nothing_more_is_lost() {
        for name in Architecture::names() {
            let network = Network::new(Architecture::find(name).unwrap().network(7));
            let layout = network.layout();
            for (entries, length) in
                [(&layout.params, layout.param_buffer()), (&layout.stats, layout.stat_buffer())]
            {
                let ends = entries.iter().map(|entry| entry.range.end.next_multiple_of(8));
                let starts = entries[1..].iter().map(|entry| entry.range.start).chain([length]);
                assert_eq!(entries[0].range.start, 0, "{name}");
                assert!(ends.eq(starts), "{name}");
            }
            let lost = layout.param_buffer() - layout.param_count();
            assert!(lost > 0 && lost < 8 * layout.params.len(), "{name}: {lost} elements of padding");
        }
    }

    /// Weight decay reaches every kernel and nothing else.
    #[test]
    fn decay_covers_kernels() {
        let network = Network::new(Architecture::find("b0").unwrap().network(7));
        let layout = network.layout();
        let decayed = layout.decayed();
        let inside = |at: usize| decayed.iter().any(|range| range.contains(&at));
        for entry in &layout.params {
            for at in [entry.range.start, entry.range.end - 1] {
                assert_eq!(inside(at), entry.shape.len() > 1, "{}", entry.name);
            }
        }
        assert!(decayed.windows(2).all(|pair| pair[0].end < pair[1].start), "sorted, disjoint, joined");
    }
}
