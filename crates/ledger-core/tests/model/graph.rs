//! The graph of what a model can reach: who can get where, and what can go round for ever.
//!
//! stateright checks what must hold in each state, and says by which shortest way a state is reached that breaks it. Its
//! `eventually` asks something else than "can still be reached from everywhere", and misses cycles; so the edges are
//! kept as the checker walks them, and searched here. A node is the fingerprint of a state: 64 bits, as in the checker.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Mutex;

/// For a label, the labels along a cycle that it is part of.
pub(super) type Cycles = BTreeMap<&'static str, Vec<&'static str>>;

/// Edges as they are walked, possibly twice: from, to, and what they are called.
#[derive(Debug, Default)]
pub(super) struct Walked(Mutex<HashSet<(u64, u64, &'static str)>>);

impl Walked {
    pub(super) fn edge(&self, from: u64, to: u64, label: &'static str) {
        self.0.lock().expect("no walker panics while it holds this").insert((from, to, label));
    }

    pub(super) fn graph(&self) -> Graph {
        let walked = self.0.lock().expect("no walker panics while it holds this");
        let mut numbers: HashMap<u64, u32> = HashMap::new();
        let mut number = |node: u64| {
            let next = u32::try_from(numbers.len()).expect("fewer than 2^32 states");
            *numbers.entry(node).or_insert(next)
        };
        let mut edges: Vec<_> =
            walked.iter().map(|(from, to, label)| (number(*from), number(*to), *label)).collect();
        edges.sort_unstable();
        Graph { numbers, edges }
    }
}

/// What was walked. Nodes are numbered from 0.
#[derive(Debug)]
pub(super) struct Graph {
    numbers: HashMap<u64, u32>,
    edges: Vec<(u32, u32, &'static str)>,
}

impl Graph {
    pub(super) fn nodes(&self) -> usize {
        self.numbers.len()
    }

    pub(super) fn edges(&self) -> usize {
        self.edges.len()
    }

    /// Nodes from which no `goal` can be reached over edges that `may` be taken.
    pub(super) fn stuck(&self, goals: &HashSet<u64>, may: impl Fn(&str) -> bool) -> HashSet<u64> {
        let mut back: Vec<Vec<u32>> = vec![Vec::new(); self.nodes()];
        for (from, to, _) in self.edges.iter().filter(|(_, _, label)| may(label)) {
            back[*to as usize].push(*from);
        }
        let mut reaches = vec![false; self.nodes()];
        let mut next: Vec<u32> = goals.iter().filter_map(|goal| self.numbers.get(goal).copied()).collect();
        while let Some(node) = next.pop() {
            if !std::mem::replace(&mut reaches[node as usize], true) {
                next.extend(&back[node as usize]);
            }
        }
        self.numbers.iter().filter(|(_, node)| !reaches[**node as usize]).map(|(name, _)| *name).collect()
    }

    /// For each label that is part of a cycle of edges that `may` be taken: a shortest such cycle, as the labels along
    /// it, this one first. Empty: nothing goes round.
    pub(super) fn cycles(&self, may: impl Fn(&str) -> bool) -> Cycles {
        let edges = self.on_cycles(may);
        let mut out: HashMap<u32, Vec<(u32, &'static str)>> = HashMap::new();
        for (from, to, label) in &edges {
            out.entry(*from).or_default().push((*to, label));
        }
        let mut found: Cycles = BTreeMap::new();
        let mut tried: BTreeMap<&'static str, u32> = BTreeMap::new();
        for (from, to, label) in &edges {
            // A few beginnings for each label: any of them shows the cycle, hardly any a longer one than needed.
            let tries = tried.entry(label).or_default();
            *tries += 1;
            if *tries > 20 {
                continue;
            }
            if let Some(rest) = way(&out, *to, *from)
                && found.get(label).is_none_or(|known| rest.len() + 1 < known.len())
            {
                found.insert(label, std::iter::once(*label).chain(rest).collect());
            }
        }
        found
    }

    /// Edges that `may` be taken, without those that nothing leads to any more or that lead nowhere: what is on a cycle,
    /// or between two.
    fn on_cycles(&self, may: impl Fn(&str) -> bool) -> Vec<(u32, u32, &'static str)> {
        let mut edges: Vec<_> = self.edges.iter().filter(|(_, _, label)| may(label)).copied().collect();
        for end in [|edge: &(u32, u32, &str)| (edge.0, edge.1), |edge: &(u32, u32, &str)| (edge.1, edge.0)] {
            let mut left = vec![0_u32; self.nodes()];
            let mut back: Vec<Vec<u32>> = vec![Vec::new(); self.nodes()];
            for edge in &edges {
                let (from, to) = end(edge);
                left[from as usize] += 1;
                back[to as usize].push(from);
            }
            let mut gone: Vec<u32> =
                (0..).zip(&left).filter(|(_, n)| **n == 0).map(|(node, _)| node).collect();
            while let Some(node) = gone.pop() {
                for from in &back[node as usize] {
                    left[*from as usize] -= 1;
                    if left[*from as usize] == 0 {
                        gone.push(*from);
                    }
                }
            }
            edges.retain(|edge| left[edge.0 as usize] > 0 && left[edge.1 as usize] > 0);
        }
        edges
    }
}

fn way(out: &HashMap<u32, Vec<(u32, &'static str)>>, from: u32, to: u32) -> Option<VecDeque<&'static str>> {
    let mut came: HashMap<u32, (u32, &'static str)> = HashMap::new();
    let mut next = VecDeque::from([from]);
    while let Some(node) = next.pop_front() {
        if node == to {
            let mut labels = VecDeque::new();
            let mut at = to;
            while at != from {
                let (before, label) = came[&at];
                labels.push_front(label);
                at = before;
            }
            return Some(labels);
        }
        for (neighbour, label) in out.get(&node).into_iter().flatten() {
            if *neighbour != from && !came.contains_key(neighbour) {
                came.insert(*neighbour, (node, label));
                next.push_back(*neighbour);
            }
        }
    }
    None
}
