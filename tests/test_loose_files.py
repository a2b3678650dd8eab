"""Images in folders as samples, and the blocks in which processes share them."""

import numpy as np
import pytest
from classifiers import images

from quarterlight.finetune.inputs import InputSamples
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.loose_files import open_files
from quarterlight.ssl.spans import ChunkSpans, chunks_of


def test_folders_and_files_are_numbered_in_a_fixed_order(tmp_path):
    paths = images(tmp_path / "a", 7)
    (tmp_path / "a" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "a" / "notes.txt").write_bytes(b"x")
    index = open_files([str(tmp_path / "a"), str(paths[0]), str(paths[1]), str(paths[6])])
    assert [str(index.path(i)) for i in range(len(index))] == list(map(str, [*paths, paths[0], paths[1], paths[6]]))
    assert index.read(5) == paths[5].read_bytes()
    assert (index.label == -1).all() and index.size.tolist()[:7] == [path.stat().st_size for path in paths]


def test_the_fingerprint_follows_names_and_sizes_and_not_the_place(tmp_path):
    images(tmp_path / "a"), images(tmp_path / "b")
    first, second = (open_files([str(tmp_path / name)]).fingerprint() for name in "ab")
    assert first == second
    (tmp_path / "b" / "0.png").write_bytes(b"other")
    assert open_files([str(tmp_path / "b")]).fingerprint() != first


def test_a_line_break_in_a_name_is_refused(tmp_path):
    (tmp_path / "a\nb.png").write_bytes(b"x")
    with pytest.raises(InputError, match="line break in its name"):
        open_files([str(tmp_path)])


def test_an_unreadable_image_is_black_and_named_by_its_number(tmp_path):
    paths = images(tmp_path, 5)
    paths[1].write_bytes(b"no image")
    paths[3].unlink()
    paths[3].symlink_to(tmp_path / "nowhere")
    samples = InputSamples(open_files([str(tmp_path)]), CenterCrop((16, 16), 1.0), 3)
    batch = samples.batch(0, 5)
    assert [bad.key for bad in batch.bad] == ["1", "3"]
    assert [bool(image.any()) for image in batch.images] == [True, False, True, False, True]
    assert batch.keys == [str(path.relative_to(tmp_path)) for path in paths]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_samples", "block", "batch_size"), [(23, 5, 2), (23, 5, 7), (4, 10, 3), (20, 4, 4)])
def test_blocks_cover_what_is_missing_once_in_the_same_batches(world_size, num_samples, block, batch_size):
    count = -(-num_samples // block)
    for blocks in (range(count), [i for i in range(count) if i % 2]):
        chunks = chunks_of(blocks, block, num_samples)
        ranks = [
            ChunkSpans(chunks, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        alone = ChunkSpans(chunks, batch_size=batch_size, rank=0, world_size=1)
        assert sorted(span for spans in ranks for span in spans) == list(alone)
        wanted = [i for b in blocks for i in range(b * block, min((b + 1) * block, num_samples))]
        assert [i for start, stop in alone for i in range(start, stop)] == wanted
        for spans in ranks:
            assert len(spans) == len(list(spans)) and list(ranks[0].of_rank(spans.rank)) == list(spans)
            assert all(stop - start <= spans.largest for start, stop in spans)
    assert np.array_equal(sorted(wanted), wanted)
