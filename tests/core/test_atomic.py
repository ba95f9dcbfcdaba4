"""A file or a folder appears whole under its name, or not at all."""

import pytest

from dattri_core.atomic import atomic_file, atomic_folder, write_text
from dattri_core.errors import StoreError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as handle:
        handle.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_file(path) as handle:
        handle.write(b"half of the new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "t", "λ ≥ 0")
    assert (tmp_path / "t").read_bytes() == "λ ≥ 0".encode()


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def never(folder):
    return False


def always(folder):
    return True


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "folder"
    with atomic_folder(path, never) as inside:
        (inside / "a").write_text("1")
        assert not path.exists()
    assert names(path) == ["a"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(error), atomic_folder(path, always) as inside:
        (inside / "new").write_text("half")
        raise error
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    rename = type(path).rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path, always) as inside:
        (inside / "new").write_text("new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with atomic_folder(path, always) as inside:
        (inside / "new").write_text("new")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["folder"]


def test_a_foreign_folder_is_refused_before_the_work(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    (path / "cat.jpg").write_text("cat")
    with pytest.raises(StoreError, match="holds other files"), atomic_folder(path, never):
        pytest.fail("the block must not run")
    assert names(path) == ["cat.jpg"]


def test_a_folder_that_fills_during_the_work_is_kept(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(StoreError, match="holds other files"), atomic_folder(path, never) as inside:
        (inside / "new").write_text("new")
        path.mkdir()
        (path / "cat.jpg").write_text("cat")
    assert names(path) == ["cat.jpg"]


def test_a_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with (
        pytest.raises(StoreError, match="a file has this name"),
        atomic_folder(tmp_path / "x", always),
    ):
        pytest.fail("the block must not run")
