import json
import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equireg import read_domains, read_nico
from tests.image_trees import make_cells, make_images

SPLITS = ("train", "val", "test")


def cells(files):
    """How many images of each (class, context), by name."""
    pairs = zip(files.targets, files.contexts.tolist())
    return Counter((files.classes[label], files.context_names[context]) for label, context in pairs)


def check_labels(files, context_first):
    """Labels and contexts agree with the folders' names."""
    for path, label, context in zip(files.paths, files.targets, files.contexts.tolist()):
        first, second = path.split("/")[-3:-1]
        folders = (second, first) if context_first else (first, second)
        assert folders == (files.classes[label], files.context_names[context])


# -------------------------------------------------------------------------------------------------------------- domains


@st.composite
def domain_trees(draw):
    domains = draw(st.integers(2, 4))
    classes = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(10, 40), min_size=domains * classes, max_size=domains * classes))
    return {(f"d{n // classes}", f"c{n % classes}"): size for n, size in enumerate(sizes)}


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(domain_trees(), st.sampled_from([None, 0.0, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 10**9))
def test_splits_are_disjoint_complete_and_repeatable(tmp_path_factory, tree, bias, leave_out, seed):
    domains = sorted({domain for domain, _ in tree})
    leave_out = leave_out and (bias is None or len(domains) > 2)
    root = make_cells(tmp_path_factory.mktemp("domains"), tree)
    options = {"test_domain": domains[-1] if leave_out else None, "bias": bias, "seed": seed}
    splits = {split: read_domains(root, split, **options) for split in SPLITS}
    chosen = [path for files in splits.values() for path in files.paths]
    assert len(chosen) == len(set(chosen))  # disjoint
    for split, files in splits.items():
        check_labels(files, context_first=True)
        assert files.paths == sorted(files.paths)
        assert files.paths == read_domains(root, split, **options).paths
        assert files.context_names == domains
    if bias is None:
        assert len(chosen) == sum(tree.values())  # complete
    if leave_out:
        assert cells(splits["test"]) == {(c, d): size for (d, c), size in tree.items() if d == domains[-1]}
        assert domains[-1] not in {domain for split in SPLITS[:2] for _, domain in cells(splits[split])}
    if bias is not None:
        balanced = SPLITS[1:2] if leave_out else SPLITS[1:]
        for split in balanced:
            counts = cells(splits[split])
            assert len(set(counts.values())) == 1
            assert len(counts) == len({c for _, c in tree}) * (len(domains) - leave_out)
        check_bias(splits["train"], bias, len(domains) - leave_out)


def check_bias(train, bias, num_domains):
    counts = cells(train)
    per_class = train.labels.bincount(minlength=len(train.classes))
    total = int(per_class[0])
    assert (per_class == total).all()
    own = total - max(round(total - bias * total), 1 if bias < 1 and total > 1 else 0)
    for name in train.classes:
        sizes = sorted((counts[name, domain] for domain in train.context_names), reverse=True)[:num_domains]
        if bias > 0.5:
            assert abs(sizes[0] - own) <= 1  # halves may be rounded either way
            assert sizes[1] - sizes[-1] <= 1
        assert sum(sizes) == total
    if bias > 0.8 and total >= 10:  # the heads are dealt in turn
        heads = [max(train.context_names, key=lambda d: counts[name, d]) for name in train.classes]
        used = Counter(heads)
        assert max(used.values()) - min(used[d] for d in used) <= 1
        assert len(used) == min(len(heads), num_domains)


def test_bias_by_hand(tmp_path):
    """100 images of each of 3 classes in 3 domains: 20 for validation, 20 for the test, 60 left."""
    root = make_cells(tmp_path, {(d, c): 100 for d in "xyz" for c in "abc"})
    train = read_domains(root, bias=0.9)
    assert sorted(cells(train).values()) == [3, 3, 3, 4, 4, 4, 60, 60, 60]  # 60 of 67: 66.67 rounds to them
    assert [sorted(cells(read_domains(root, bias=0.9, shots=20)).values())] == [[1] * 6 + [18] * 3]
    assert set(cells(read_domains(root, bias=1.0, shots=20)).values()) == {20}
    assert sorted(cells(read_domains(root, bias=0.95, shots=5)).values()) == [1, 1, 1, 4, 4, 4]  # one goes against
    assert set(cells(read_domains(root, "val", bias=0.9)).values()) == {20}


@pytest.mark.parametrize("bias", [None, 0.3, 0.9, 1.0])
def test_fewer_shots_are_a_part_of_more(tmp_path, bias):
    root = make_cells(tmp_path, {(d, c): 30 for d in "xyz" for c in "abc"})
    before = set()
    for shots in range(1, 19):
        train = read_domains(root, bias=bias, shots=shots)
        assert train.labels.bincount().tolist() == [shots] * 3
        assert before <= set(train.paths)
        before = set(train.paths)

    for split in ("val", "test"):
        held_out = {tuple(read_domains(root, split, bias=b, shots=shots).paths) for b in (0.3, 0.9) for shots in (1, 9)}
        assert len(held_out) == 1


def test_seeds_differ_and_the_place_of_the_folder_does_not_matter(tmp_path):
    trees = [make_cells(tmp_path / name, {(d, c): 30 for d in "xy" for c in "ab"}) for name in ("one", "two/deep")]
    drawn = [[read_domains(root, seed=seed).paths for seed in range(3)] for root in trees]
    assert len({tuple(paths) for paths in drawn[0]}) == 3
    assert [[path.removeprefix(str(trees[0])) for path in paths] for paths in drawn[0]] == [
        [path.removeprefix(str(trees[1])) for path in paths] for paths in drawn[1]
    ]


def test_a_draw_written_down(tmp_path):
    """The same on every machine and with every release: SHA-256 of the seed and the name, smallest first."""
    import hashlib

    root = make_cells(tmp_path, {(d, c): 10 for d in "xy" for c in "ab"})
    order = sorted(range(10), key=lambda n: hashlib.sha256(f"7 x/a/{n:03}.png".encode()).hexdigest())
    val = read_domains(root, "val", seed=7)
    assert sorted(f"{n:03}.png" for n in order[:2]) == [p[-7:] for p in val.paths if p.endswith(".png") and "x/a/" in p]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_domain": "z"}, "test_domain must be one of 'x', 'y', got 'z'"),
        ({"bias": 1.5}, r"bias must be in 0 \.\. 1, got 1\.5"),
        (
            {"bias": 0.9, "shots": 8},
            r"shots must be in 1 \.\. 7, what every class has images for with bias=0\.9, got 8",
        ),
        ({"shots": 13}, "shots must be at most 12, the training images of class 'a', got 13"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"held_out": 0.5}, r"held_out must be above 0 and below 0\.5"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"test_domain": "x", "bias": 0.5}, ".*three domains or more"),
        ({"split": "valid"}, "split must be one of"),
    ],
)
def test_wrong_options_of_domains(tmp_path, options, message):
    root = make_cells(tmp_path, {(d, c): 10 for d in "xy" for c in "ab"})
    with pytest.raises(ValueError, match="read_domains: " + message):
        read_domains(root, **options)


def test_folders_that_cannot_be_split(tmp_path):
    make_cells(tmp_path, {**{(d, c): 10 for d in "xy" for c in "ab"}, ("y", "c"): 3})
    with pytest.raises(ValueError, match="folder '.*/y' must be one with the classes of 'x', got 'c' in one alone"):
        read_domains(tmp_path)
    make_cells(tmp_path, {("x", "c"): 2})
    with pytest.raises(ValueError, match="folder '/.*/x/c' must be one of more than 2 images, got 2"):
        read_domains(tmp_path)


def test_broken_images_are_skipped_before_the_split(tmp_path):  # T12
    root = make_images(tmp_path, *(f"{d}/{c}/{n}.png" for d in "xy" for c in "ab" for n in range(10)))
    for number in range(5):
        (root / "x" / "a" / f"{number}.png").write_bytes(b"")
    for split in ("val", "test"):
        files = read_domains(root, split, bias=0.5, broken="skip", progress=False)
        assert set(cells(files).values()) == {1}  # a fifth of the five that are left
        assert len(files.skipped) == 5
        assert not {path for path, _ in files.skipped} & set(files.paths)
    for number in range(5, 10):
        (root / "x" / "a" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="folder '/.*/x/a' must be one with images that can be decoded, got none"):
        read_domains(root, broken="skip", progress=False)


def test_real_pacs(real_images):
    root = real_images / "pacs64"
    train, val, test = (read_domains(root, split, bias=0.95) for split in SPLITS)
    assert not set(train.paths) & set(val.paths) | set(val.paths) & set(test.paths) | set(train.paths) & set(test.paths)
    assert set(cells(val).values()) == set(cells(test).values()) == {16}  # a fifth of 80 sketches of houses
    check_bias(train, 0.95, 4)
    check_labels(train, context_first=True)
    assert sum(len(read_domains(root, split, test_domain="sketch")) for split in SPLITS) == 9991
    assert set(read_domains(root, "test", test_domain="sketch").contexts.tolist()) == {3}
    assert train[0][0].size == (64, 64)


# ----------------------------------------------------------------------------------------------------------------- NICO

# Contexts of each animal of NICO: seven that CaaM trains on, from head to tail, and three more.
ANIMALS = {
    "bear": "in forest,black,brown,eating grass,in water,lying,on snow,on ground,on tree,white",
    "dog": "on grass,in water,in cage,eating,on beach,lying,running,at home,in street,on snow",
    "sheep": "eating,on road,walking,on snow,on grass,lying,in forest,in water,at sunset,aside people",
}


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """76 images of each animal in each of its contexts, of which 50 are left for training."""
    root = tmp_path_factory.mktemp("nico") / "Animal"
    return make_cells(root, {(name, c): 76 for name, contexts in ANIMALS.items() for c in contexts.split(",")})


def test_the_published_setting(animals):
    """50 images of a context in training: 50 * 0.02^(i / 6) of the i-th, rounded down."""
    root = animals.parent
    train, val, test = (read_nico(root, split) for split in SPLITS)
    tail = [50, 26, 13, 7, 3, 1, 1]
    assert tail == [math.floor(50 * 0.02 ** (i / 6) + 1e-9) for i in range(7)]
    for name, contexts in ANIMALS.items():
        counts = cells(train)
        assert [counts[name, c.replace(" ", "_")] for c in contexts.split(",")] == [*tail, 0, 0, 0]
    assert set(cells(val).values()) == set(cells(test).values()) == {13}
    assert len(cells(val)) == len(cells(test)) == 30
    assert train.classes == sorted(ANIMALS)
    contexts = {c.replace(" ", "_") for animal in ANIMALS.values() for c in animal.split(",")}
    assert train.context_names == val.context_names == sorted(contexts)


def test_the_difficulties_alone(animals):
    by_class = {}
    for setting in ("long-tailed", "zero-shot", "orthogonal"):
        counts = cells(read_nico(animals, setting=setting))
        by_class[setting] = {
            name: {context: count for (animal, context), count in counts.items() if animal == name} for name in ANIMALS
        }
    zero = by_class["zero-shot"]
    assert all(set(counts.values()) == {50} and len(counts) == 7 for counts in zero.values())
    tails = [50 * 0.02 ** (i / 9) for i in range(10)]
    for setting in ("long-tailed", "orthogonal"):
        for counts in by_class[setting].values():
            assert sorted(counts.values(), reverse=True) == [math.floor(n + 1e-9) for n in tails]
    heads = {name: max(counts, key=counts.get) for name, counts in by_class["orthogonal"].items()}
    assert heads == {"bear": "in_forest", "dog": "on_grass", "sheep": "eating"}
    # Long-tailed alone: of two contexts that two classes share, the same is the more frequent in both.
    for one in ANIMALS:
        for other in ANIMALS:
            a, b = (by_class["long-tailed"][name] for name in (one, other))
            shared = sorted(set(a) & set(b), key=a.get)
            assert shared == sorted(shared, key=b.get)


def test_the_long_tail_has_one_order_whatever_the_sizes(tmp_path):
    sizes = {("a", "p"): 30, ("a", "q"): 60, ("b", "p"): 60, ("b", "q"): 30}
    counts = cells(read_nico(make_cells(tmp_path, sizes), setting="long-tailed", imbalance=0.1))
    assert counts == {("a", "p"): 10, ("a", "q"): 3, ("b", "p"): 34, ("b", "q"): 1}


@st.composite
def nico_trees(draw):
    classes = draw(st.integers(2, 5))
    tree = {}
    for label in range(classes):
        for context in draw(st.sets(st.integers(0, 6), min_size=2)):
            tree[f"c{label}", f"in {context}"] = draw(st.integers(1, 30))
    return tree


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(nico_trees(), st.sampled_from(["adjusting", "long-tailed", "zero-shot", "orthogonal"]), st.integers(0, 10**9))
def test_any_contexts(tmp_path_factory, tree, setting, seed):
    root = make_cells(tmp_path_factory.mktemp("nico"), tree)
    options = {"setting": setting, "seed": seed, "held_out": 4}
    splits = {split: read_nico(root, split, **options) for split in SPLITS}
    chosen = [path for files in splits.values() for path in files.paths]
    assert len(chosen) == len(set(chosen))
    sizes = {(c, context.replace(" ", "_")): size for (c, context), size in tree.items()}
    for split, files in splits.items():
        assert files.paths == read_nico(root, split, **options).paths
        assert [p.split("/")[-3:-1] for p in files.paths] == [
            [files.classes[label], files.context_names[context].replace("_", " ")]
            for label, context in zip(files.targets, files.contexts.tolist())
        ]
    for split in SPLITS[1:]:
        assert cells(splits[split]) == {pair: min(4, n // 3) for pair, n in sizes.items() if n // 3}
    trained = cells(splits["train"])
    for name in {name for name, _ in tree}:
        own = {pair for pair in sizes if pair[0] == name}
        seen = {pair for pair in own if trained[pair]}
        unseen = setting in ("adjusting", "zero-shot")
        assert seen
        assert (len(seen) < len(own)) == unseen
        for pair in seen:
            left = sizes[pair] - 2 * min(4, sizes[pair] // 3)
            assert trained[pair] <= left
            if setting == "zero-shot":
                assert trained[pair] == left


def test_heads_are_unique_where_they_can_be(tmp_path):
    """Greedily, a and b would both take the biggest, p, and c, which has p and q only, could not be served."""
    sizes = {"ap": 60, "aq": 40, "ar": 30, "bp": 60, "bq": 40, "cp": 60, "cr": 9}
    sizes = {tuple(pair): size for pair, size in sizes.items()}
    counts = cells(read_nico(make_cells(tmp_path, sizes), setting="orthogonal", imbalance=0.01))
    kept = {pair: counts[pair] / (n - 2 * min(13, n // 3)) for pair, n in sizes.items()}
    heads = {name: max((pair for pair in sizes if pair[0] == name), key=kept.get)[1] for name in "abc"}
    assert len(set(heads.values())) == 3


def test_given_contexts(animals):
    order = {"bear": ["white", "on tree"], "dog": ["at_home"], "sheep": ["lying", "eating", "walking"]}
    counts = cells(read_nico(animals, training_contexts=order, imbalance=0.25))
    bear, sheep = {"white": 50, "on_tree": 12}, {"lying": 50, "eating": 25, "walking": 12}
    expected = {"bear": bear, "dog": {"at_home": 50}, "sheep": sheep}
    assert counts == {(name, context): n for name, contexts in expected.items() for context, n in contexts.items()}
    for wrong, message in [
        ({"bear": ["white"]}, r"given for the classes \['bear', 'dog', 'sheep'\], got \['bear'\]"),
        ({**order, "dog": ["on_moon"]}, "got 'on_moon' of 'dog'"),
        ({**order, "dog": []}, r"got \[\]"),
        ({**order, "dog": ["running", "running"]}, "different ones of"),
    ]:
        with pytest.raises(ValueError, match="read_nico: training_contexts must be .*" + message):
            read_nico(animals, training_contexts=wrong)


def released(root, **sizes):
    """CaaM's release: flat folders, numbers in names, and the names of the numbers."""
    labels = {"bear": 4, "dog": 0, "sheep": 9}
    found = sorted({c.replace(" ", "_") for animal in ANIMALS.values() for c in animal.split(",")})
    contexts = {**{name: n for n, name in enumerate(found)}, "unused": 99}
    for split, size in sizes.items():
        folder = root / "multi_classification" / split
        folder.mkdir(parents=True)
        for animal, own in ANIMALS.items():
            for context in own.split(","):
                for n in range(size):
                    (folder / f"{labels[animal]}_{contexts[context.replace(' ', '_')]}_{n}.jpg").touch()
    (root / "label_file").mkdir()
    (root / "label_file" / "Animal_name2label.json").write_text(json.dumps(labels))
    (root / "label_file" / "Context_name2label.json").write_text(json.dumps(contexts))
    return root


def test_the_release_of_caam(tmp_path, animals):
    root = released(tmp_path, train=50, val=3, test=2)
    train, val, test = (read_nico(root, split) for split in SPLITS)
    assert cells(train) == cells(read_nico(animals))
    assert set(cells(val).values()) == {3}
    assert set(cells(test).values()) == {2}
    assert train.classes == test.classes == sorted(ANIMALS)
    assert train.context_names == val.context_names == test.context_names
    images = root / "multi_classification" / "val"
    number = json.loads((root / "label_file" / "Context_name2label.json").read_text())["black"]
    for path in images.glob(f"*_{number}_*"):
        path.unlink()
    assert read_nico(root, "val").context_names == train.context_names  # the same where a split lacks one
    for path in images.glob("4_*"):
        path.unlink()
    with pytest.raises(ValueError, match="class 'bear'"):
        read_nico(root, "val")


def test_misnamed_files_of_the_release(tmp_path):  # T12
    root = released(tmp_path, train=1, val=1, test=1)
    for path in (root / "multi_classification" / "val").iterdir():
        make_images(path.parent, path.name, size=(1, 1))
    folder = root / "multi_classification" / "val"
    for name in ("dog on grass.jpg", "77_0_0.jpg"):
        make_images(folder, name)
    (folder / "0_0_broken.jpg").touch()
    with pytest.raises(ValueError, match="file '.*/val/77_0_0.jpg' must be named <class number>_.*got another name"):
        read_nico(root, "val")
    files = read_nico(root, "val", broken="skip", progress=False)
    skipped = sorted(path.rsplit("/")[-1] for path, _ in files.skipped)
    assert skipped == ["0_0_broken.jpg", "77_0_0.jpg", "dog on grass.jpg"]
    assert len(files) == 30
    assert len(read_nico(root, "val", broken="skip", max_broken=3, progress=False)) == 30
    with pytest.raises(ValueError, match="at most max_broken=2 are broken, got 3"):
        read_nico(root, "val", broken="skip", max_broken=2, progress=False)


@pytest.mark.parametrize("text", ["", "[]", '{"dog": []}', '{"dog": "x"}', "[" * 100_000, "\xff"])
def test_broken_names_of_the_release(tmp_path, text):
    root = released(tmp_path, train=1, val=1, test=1)
    (root / "label_file" / "Animal_name2label.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="Animal_name2label.json' must be a JSON object of names and their numbers"):
        read_nico(root)
    (root / "label_file" / "Animal_name2label.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{root}/label_file/Animal_name2label.json"):
        read_nico(root)


def test_wrong_arguments_and_folders_of_nico(tmp_path):
    root = make_cells(tmp_path / "a", {("cat", "in snow"): 5, ("cat", "in sun"): 5, ("dog", "in snow"): 5})
    with pytest.raises(ValueError, match="folder '.*/dog' must be one with folders for two contexts or more"):
        read_nico(root)
    make_cells(root, {("dog", "in sun"): 5})
    for options, message in [
        ({"setting": "hard"}, "setting must be one of 'adjusting', "),
        ({"imbalance": 0}, "imbalance must be above 0, got 0"),
        ({"imbalance": 2}, r"imbalance must be in 0 \.\. 1, got 2"),
        ({"held_out": 0}, "held_out must be at least 1, got 0"),
        ({"split": "dev"}, "split must be one of"),
    ]:
        with pytest.raises(ValueError, match="read_nico: " + message):
            read_nico(root, **options)
