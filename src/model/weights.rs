//! Weights in safetensors files, under timm's names or torchvision's.

use super::names::{Naming, torchvision_name};
use crate::nn::{Entry, Network};
use crate::tensor::Real;
use crate::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The key of our own description in a file's metadata; it holds JSON.
pub const METADATA_KEY: &str = "effnetv2";

/// A safetensors file in memory.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
}

impl WeightFile {
    /// Reads and checks a whole file.
    ///
    /// # Errors
    /// When it cannot be read, or is not a complete safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
        let header = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(path, &e))?;
        SafeTensors::deserialize(&bytes).map_err(|e| damaged(path, &e))?;
        let metadata = header.1.metadata().clone().unwrap_or_default();
        Ok(Self { path: path.to_owned(), bytes, metadata })
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Our own description, if the file is one of ours.
    pub fn description(&self) -> Option<&str> {
        self.metadata.get(METADATA_KEY).map(String::as_str)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|e| damaged(&self.path, &e))
    }

    /// The spelling of the file's names, told by the stem.
    ///
    /// # Errors
    /// When it has neither stem: it is of no EfficientNet.
    pub fn naming(&self) -> Result<Naming> {
        let tensors = self.tensors()?;
        if tensors.tensor("conv_stem.weight").is_ok() {
            Ok(Naming::Timm)
        } else if tensors.tensor("features.0.0.weight").is_ok() {
            Ok(Naming::Torchvision)
        } else {
            let problem = "no weights of an EfficientNet: it has neither `conv_stem.weight` (timm) nor \
                           `features.0.0.weight` (torchvision)";
            Err(Error::file(&self.path, problem))
        }
    }

    /// Whether the file's classifier has the classes of `network`.
    ///
    /// # Errors
    /// When it has none.
    pub fn fits_classifier(&self, network: &Network) -> Result<bool> {
        let name = match self.naming()? {
            Naming::Timm => "classifier.bias",
            Naming::Torchvision => "classifier.1.bias",
        };
        let tensors = self.tensors()?;
        let bias = tensors.tensor(name).map_err(|_| {
            Error::file(&self.path, format!("tensor `{name}` is missing; use a file with a classifier"))
        })?;
        Ok(bias.shape() == [network.spec().classes])
    }

    /// Copies the tensors of `entries` (all of one buffer) into `buffer`. `name_of` gives each tensor's name in the
    /// file, or none to leave it as it is.
    ///
    /// # Errors
    /// When a tensor is missing, of another shape or of a type that holds no reals.
    pub fn load<F: Real>(
        &self,
        entries: &[Entry],
        buffer: &mut [F],
        name_of: impl Fn(&Entry) -> Option<String>,
    ) -> Result<()> {
        let tensors = self.tensors()?;
        for entry in entries {
            let Some(name) = name_of(entry) else { continue };
            let wrong = |problem: String| Error::file(&self.path, problem);
            let tensor = tensors.tensor(&name).map_err(|_| {
                wrong(format!("tensor `{name}` is missing; the file belongs to another model"))
            })?;
            if tensor.shape() != entry.shape {
                let (found, expected) = (tensor.shape(), &entry.shape);
                let problem = format!(
                    "tensor `{name}` has shape {found:?}, the model expects {expected:?}; it belongs to another \
                     model or number of classes"
                );
                return Err(wrong(problem));
            }
            let values = reals(&tensor).ok_or_else(|| {
                wrong(format!("tensor `{name}` is of type {:?}; use F64, F32, F16 or BF16", tensor.dtype()))
            })?;
            entry.set_from_torch(values.into_iter().map(F::of), buffer);
        }
        Ok(())
    }

    /// Fills parameters and statistics of `network` from a file of timm or torchvision. With `keep_classifier` the
    /// classifier stays as it is: the way to start from weights for other classes.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_network<F: Real>(
        &self,
        network: &Network,
        params: &mut [F],
        stats: &mut [F],
        keep_classifier: bool,
    ) -> Result<()> {
        let naming = self.naming()?;
        let name_of = |entry: &Entry| match naming {
            _ if keep_classifier && entry.name.starts_with("classifier.") => None,
            Naming::Timm => Some(entry.name.clone()),
            Naming::Torchvision => torchvision_name(network.spec(), &entry.name),
        };
        self.load(&network.layout().params, params, name_of)?;
        self.load(&network.layout().stats, stats, name_of)
    }
}

fn damaged(path: &Path, error: &SafeTensorError) -> Error {
    let problem = match error {
        SafeTensorError::MetadataIncompleteBuffer
        | SafeTensorError::InvalidHeaderLength
        | SafeTensorError::HeaderTooSmall => "truncated or damaged: it ends before its tensors do".to_owned(),
        other => format!("not a safetensors file ({other})"),
    };
    Error::file(path, format!("{problem}; use an intact copy"))
}

/// The values of a tensor of any floating-point type.
fn reals(tensor: &TensorView<'_>) -> Option<Vec<f64>> {
    let data = tensor.data();
    let (words, _) = data.as_chunks::<4>();
    let (halves, _) = data.as_chunks::<2>();
    Some(match tensor.dtype() {
        Dtype::F64 => data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        Dtype::F32 => words.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        Dtype::F16 => halves.iter().map(|b| half::f16::from_le_bytes(*b).into()).collect(),
        Dtype::BF16 => halves.iter().map(|b| half::bf16::from_le_bytes(*b).into()).collect(),
        _ => return None,
    })
}

/// One tensor to be written, in f32 and PyTorch's order.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// The tensors of `entries` in `buffer`, each name behind `prefix`.
pub fn named<F: Real>(prefix: &str, entries: &[Entry], buffer: &[F]) -> Vec<NamedTensor> {
    let tensor = |entry: &Entry| NamedTensor {
        name: format!("{prefix}{}", entry.name),
        shape: entry.shape.clone(),
        values: entry.to_torch(buffer).into_iter().map(|v| v.f64() as f32).collect(),
    };
    entries.iter().map(tensor).collect()
}

/// Writes a file so that at every moment `path` is either the old file or the new one: to a temporary file beside it,
/// flushed to the disk, then renamed. The same input gives the same bytes.
///
/// # Errors
/// When the disk is full or the folder cannot be written; the old file is then still there.
pub fn write(path: &Path, tensors: &[NamedTensor], description: String) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".part");
    let temporary = PathBuf::from(temporary);
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), description)]);
    let outcome = write_to(&temporary, tensors, metadata).and_then(|()| fs::rename(&temporary, path));
    outcome.map_err(|source| {
        // What was written is of no use; the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
        Error::io(path, "write")(source)
    })
}

fn write_to(path: &Path, tensors: &[NamedTensor], metadata: HashMap<String, String>) -> std::io::Result<()> {
    let views = tensors.iter().map(|tensor| {
        // Files are little-endian, as every machine this runs on is.
        let bytes = bytemuck::cast_slice(&tensor.values);
        TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map(|view| (tensor.name.as_str(), view))
    });
    // `safetensors::serialize_to_file` would leave a file of a random name behind whenever the process is killed, and
    // one that only its owner may read.
    let bytes =
        views.collect::<Result<Vec<_>, _>>().and_then(|views| safetensors::serialize(views, Some(metadata)));
    let mut file = File::create(path)?;
    file.write_all(&bytes.map_err(|error| std::io::Error::other(error.to_string()))?)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, initial_values};

    fn nano() -> (Network, Vec<f32>, Vec<f32>) {
        let network = Network::new(Architecture::find("nano").unwrap().network(10));
        let (params, stats) = initial_values(network.layout(), 3);
        (network, params, stats)
    }

    fn tensors(
        network: &Network,
        params: &[f32],
        stats: &[f32],
        rename: impl Fn(&str) -> String,
    ) -> Vec<NamedTensor> {
        let layout = network.layout();
        let mut tensors = named("", &layout.params, params);
        tensors.extend(named("", &layout.stats, stats));
        tensors.iter_mut().for_each(|t| t.name = rename(&t.name));
        tensors
    }

    #[test]
    fn both_spellings_come_back_bit_for_bit() {
        let (network, params, stats) = nano();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        for torchvision in [false, true] {
            let rename = |name: &str| match torchvision {
                true => torchvision_name(network.spec(), name).unwrap(),
                false => name.to_owned(),
            };
            write(&path, &tensors(&network, &params, &stats, rename), "{}".into()).unwrap();
            let (mut p, mut s) = (vec![0.0; params.len()], vec![0.0; stats.len()]);
            let file = WeightFile::read(&path).unwrap();
            assert_eq!(file.description(), Some("{}"));
            file.load_network(&network, &mut p, &mut s, false).unwrap();
            assert_eq!((p, s), (params.clone(), stats.clone()));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[test]
    fn wrong_files_are_named() {
        let (network, mut params, mut stats) = nano();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let mut load = |network: &Network| {
            let file = WeightFile::read(&path)?;
            let layout = network.layout();
            params.resize(layout.param_buffer(), 0.0);
            stats.resize(layout.stat_buffer(), 0.0);
            file.load_network(network, &mut params, &mut stats, false)
        };
        assert!(matches!(load(&network), Err(Error::Io { .. })));
        let (_, p, s) = nano();
        write(&path, &tensors(&network, &p, &s, str::to_owned), String::new()).unwrap();
        load(&network).unwrap();
        let eleven = Network::new(Architecture::find("nano").unwrap().network(11));
        let message = load(&eleven).unwrap_err().to_string();
        assert!(
            message.contains("weights.safetensors") && message.contains("classifier.weight"),
            "{message}"
        );
        let b0 = Network::new(Architecture::find("b0").unwrap().network(10));
        let message = load(&b0).unwrap_err().to_string();
        assert!(message.contains("another model"), "{message}");
        let whole = fs::read(&path).unwrap();
        for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            let message = load(&network).unwrap_err().to_string();
            assert!(message.contains("intact copy"), "{length}: {message}");
        }
    }

    /// A folder that does not exist stands in for a full disk: nothing is left behind and the old file stays.
    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let (network, params, stats) = nano();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let tensors = tensors(&network, &params, &stats, str::to_owned);
        write(&path, &tensors, "first".into()).unwrap();
        fs::create_dir(folder.path().join("weights.safetensors.part")).unwrap();
        assert!(write(&path, &tensors, "second".into()).is_err());
        assert_eq!(WeightFile::read(&path).unwrap().description(), Some("first"));
    }
}
