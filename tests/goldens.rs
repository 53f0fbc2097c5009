//! The reference against PyTorch: whole networks with closed-form weights, forward, backward and running statistics.

#[allow(dead_code, unreachable_pub, reason = "it is shared by test programs")]
mod golden;

use effnetv2::model::Naming;
use effnetv2::reference::Reference;
use golden::Evaluated;

fn check<F: effnetv2::tensor::Real>(case: &'static str, model: &str, naming: Naming, tolerance: f64) {
    golden::check(Reference::<F>::new(), (case, model, naming), Evaluated::Both, tolerance);
}

macro_rules! goldens {
    ($($case:ident: $model:literal, $naming:ident;)*) => {
        mod f64 {
            $(#[test] fn $case() { super::check::<f64>(stringify!($case), $model, super::Naming::$naming, 1e-9); })*
        }
        mod f32 {
            $(#[test] fn $case() { super::check::<f32>(stringify!($case), $model, super::Naming::$naming, 1e-3); })*
        }
    };
}

goldens! {
    nano_24: "nano", Timm;
    nano_odd_37: "nano", Timm;
    tf_b0_64: "b0", Timm;
    tf_s_96: "s", Timm;
    torchvision_s_64: "s", Torchvision;
}
