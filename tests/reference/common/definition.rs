//! Convolution by its definition: seven loops, and the padding as TensorFlow's and PyTorch's manuals word it.

use effnetv2::tensor::{Conv, ConvKind, Padding, Shape};

/// Output side and zeros before the first pixel.
fn side(conv: &Conv, side: usize) -> (usize, usize) {
    let (k, s) = (conv.kernel, conv.stride);
    match conv.padding {
        Padding::Same => {
            let total = if side.is_multiple_of(s) { k.saturating_sub(s) } else { k.saturating_sub(side % s) };
            (side.div_ceil(s), total / 2)
        }
        Padding::Symmetric => {
            let before = (k - 1) / 2;
            ((side + 2 * before - k) / s + 1, before)
        }
    }
}

/// Visits the indices (of x, of w, of y) of every product y += x·w and returns the shape of y.
pub fn for_products(conv: &Conv, x: Shape, mut visit: impl FnMut(usize, usize, usize)) -> Shape {
    let ((rows, top), (columns, left)) = (side(conv, x.h), side(conv, x.w));
    let y = Shape::new(x.n, rows, columns, conv.outputs);
    let k = conv.kernel;
    for n in 0..x.n {
        for p in 0..rows {
            for q in 0..columns {
                for o in 0..conv.outputs {
                    for r in 0..k {
                        for t in 0..k {
                            for i in 0..conv.inputs {
                                let (h, w) = (p * conv.stride + r, q * conv.stride + t);
                                let inside = (top..top + x.h).contains(&h) && (left..left + x.w).contains(&w);
                                if !inside || conv.kind == ConvKind::Depthwise && i != o {
                                    continue;
                                }
                                let weight = match conv.kind {
                                    ConvKind::Depthwise => (r * k + t) * conv.outputs + o,
                                    _ => ((o * k + r) * k + t) * conv.inputs + i,
                                };
                                let input = ((n * x.h + h - top) * x.w + w - left) * x.c + i;
                                visit(input, weight, ((n * rows + p) * columns + q) * conv.outputs + o);
                            }
                        }
                    }
                }
            }
        }
    }
    y
}
