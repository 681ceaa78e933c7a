//! The tree against a model: a map from paths to values in which nothing but prefixes means anything.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::ops::{self, Actor};
use super::super::tree::{Nodes, Overlay, Transaction, Tree};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Write(String, u8),
    Mkdir(String),
    Rm(String),
}

impl Step {
    fn run(&self, nodes: &mut impl Nodes) -> Result<Vec<Change>, Errno> {
        match self {
            Step::Write(path, value) => ops::write(nodes, Actor::DOM0, path, &[*value]),
            Step::Mkdir(path) => ops::mkdir(nodes, Actor::DOM0, path),
            Step::Rm(path) => ops::rm(nodes, Actor::DOM0, path),
        }
    }
}

type Model = BTreeMap<String, Vec<u8>>;

fn add_with_parents(model: &mut Model, path: &str) {
    for (end, _) in path.match_indices('/').skip(1) {
        model.entry(path[..end].to_owned()).or_default();
    }
    model.entry(path.to_owned()).or_default();
}

/// What a step does to the model, and whether it succeeds.
fn run_model(model: &mut Model, step: &Step) -> bool {
    match step {
        Step::Write(path, value) => {
            add_with_parents(model, path);
            model.insert(path.clone(), vec![*value]);
            true
        }
        Step::Mkdir(path) => {
            add_with_parents(model, path);
            true
        }
        Step::Rm(path) => {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            let allowed = parent.is_empty() || model.contains_key(parent);
            model.retain(|other, _| other != path && !other.starts_with(&format!("{path}/")));
            allowed
        }
    }
}

/// All nodes that can be reached from the root by following the lists of children.
fn reachable(tree: &mut Tree) -> Model {
    let mut found = Model::new();
    let mut waiting = vec![String::new()];
    while let Some(path) = waiting.pop() {
        let node = tree.get(if path.is_empty() { "/" } else { &path }).expect("listed children exist");
        waiting.extend(node.children.iter().map(|name| format!("{path}/{name}")));
        if !path.is_empty() {
            assert!(found.insert(path, node.value).is_none(), "listed once only");
        }
    }
    found
}

fn any_path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "ab"]), 1..5)
        .prop_map(|names| names.iter().map(|name| format!("/{name}")).collect())
}

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (any_path(), any::<u8>()).prop_map(|(path, value)| Step::Write(path, value)),
        1 => any_path().prop_map(Step::Mkdir),
        2 => any_path().prop_map(Step::Rm),
    ];
    prop::collection::vec(step, 0..30)
}

proptest! {
    #[test]
    fn the_tree_agrees_with_a_map_of_paths(steps in any_steps()) {
        let (mut tree, mut model) = (Tree::new(), Model::new());
        for step in &steps {
            prop_assert_eq!(step.run(&mut tree).is_ok(), run_model(&mut model, step), "{:?}", step);
            prop_assert_eq!(&reachable(&mut tree), &model);
        }
    }

    #[test]
    fn committed_steps_have_the_effect_and_the_events_of_direct_ones(before in any_steps(), within in any_steps()) {
        let (mut direct, mut tree) = (Tree::new(), Tree::new());
        for step in &before {
            prop_assert_eq!(step.run(&mut direct), step.run(&mut tree));
        }
        let untouched = reachable(&mut tree);
        let mut transaction = Transaction::new();
        let mut events = Vec::new();
        for step in &within {
            let expected = step.run(&mut direct);
            events.extend(expected.clone().unwrap_or_default());
            let outcome = step.run(&mut Overlay { tree: &tree, transaction: &mut transaction });
            transaction.changes.extend(outcome.clone().unwrap_or_default());
            prop_assert_eq!(outcome, expected);
        }
        prop_assert_eq!(reachable(&mut tree), untouched);
        prop_assert_eq!(transaction.commit(&mut tree), Ok(events));
        prop_assert_eq!(reachable(&mut tree), reachable(&mut direct));
    }

    #[test]
    fn a_transaction_loses_exactly_when_a_node_it_saw_has_changed(
        before in any_steps(),
        looked_at in any_path(),
        other in any_path(),
    ) {
        let mut tree = Tree::new();
        for step in &before {
            let _ = step.run(&mut tree);
        }
        let mut transaction = Transaction::new();
        let seen = Overlay { tree: &tree, transaction: &mut transaction }.get(&looked_at);
        let _ = Step::Write(other, 1).run(&mut tree);
        // The generation alone tells a rewrite with equal content from no write at all.
        let unchanged = tree.get(&looked_at) == seen;
        prop_assert_eq!(transaction.commit(&mut tree).is_ok(), unchanged);
    }
}
