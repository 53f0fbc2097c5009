//! Passes as CUDA graphs. The first pass of a kind is made launch by launch, which brings plans and memory into being;
//! the second is recorded; all others are replayed.

use super::plans::HeadKey;
use crate::backend::PassKind;
use crate::device::Graph;

/// What there is of one kind of pass.
#[derive(Debug)]
struct Entry {
    kind: PassKind,
    /// Where everything lay that the pass used.
    places: Vec<u64>,
    graph: Option<Graph<()>>,
    /// The head whose loss the pass leaves.
    head: Option<HeadKey>,
}

/// What is to be done with a pass.
#[derive(Debug)]
pub(super) enum Known<'a> {
    /// Nothing like it has been made with these buffers.
    Nothing,
    /// It has been made, but not recorded.
    Made,
    /// It can be replayed.
    Recorded(&'a mut Graph<()>, Option<HeadKey>),
}

#[derive(Debug)]
pub(super) struct Recorder {
    enabled: bool,
    entries: Vec<Entry>,
}

impl Recorder {
    pub(super) fn new(enabled: bool) -> Self {
        Self { enabled, entries: Vec::new() }
    }

    /// Whether passes are recorded at all.
    pub(super) fn enabled(&self) -> bool {
        self.enabled
    }

    /// How many kinds of pass can be replayed.
    pub(super) fn graphs(&self) -> usize {
        self.entries.iter().filter(|entry| entry.graph.is_some()).count()
    }

    /// What there is of a pass of this kind whose buffers lie at `places`.
    pub(super) fn find(&mut self, kind: PassKind, places: &[u64]) -> Known<'_> {
        match self.entries.iter_mut().find(|entry| entry.kind == kind && entry.places == places) {
            None => Known::Nothing,
            Some(Entry { graph: None, .. }) => Known::Made,
            Some(Entry { graph: Some(graph), head, .. }) => Known::Recorded(graph, *head),
        }
    }

    /// Keeps what there is now of this kind, in place of what there was: buffers that have moved do not come back.
    pub(super) fn keep(
        &mut self,
        kind: PassKind,
        places: Vec<u64>,
        graph: Option<Graph<()>>,
        head: Option<HeadKey>,
    ) {
        self.entries.retain(|entry| entry.kind != kind);
        self.entries.push(Entry { kind, places, graph, head });
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }
}
