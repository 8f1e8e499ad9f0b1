"""A disk that is full, forbidden, read-only or gone: one clear error, what was committed stays, the fill goes on."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.committed import only_store
from tests.processes import linux_only, run
from tests.training import troubled_disk
from tests.training.killed_fit import samples
from tests.training.troubled_disk import COUNT

pytestmark = [pytest.mark.slow, linux_only]

ALL = len(samples(COUNT)[2])


@pytest.fixture(scope="module")
def mounting(tmp_path_factory):
    """Skip where this user may not mount a small disk, neither as root nor in a user namespace."""
    folder = tmp_path_factory.mktemp("mounting")
    reason = run(troubled_disk.why_no_small_disk, folder / "out.json", folder=folder)
    if reason is not None:
        pytest.skip(f"needs to mount a tmpfs of its own, as root or with user namespaces: {reason}")


def is_clear(outcome, kind, *parts):
    """Whether a fit ended in one error of one sentence, after which the model could be trained as ever."""
    error = outcome["error"]
    assert error is not None and error["kind"] == kind, outcome
    message = error["message"]
    assert all(part in message for part in parts), message
    assert "\n" not in message and ". " not in message and message.endswith(".") and len(message) < 600, message
    assert outcome["as uncached"]
    return True


def is_harmless(case):
    """Whether trouble came too late, or where it did not matter."""
    return case["harmed"]["error"] is None and case["harmed"]["as uncached"]


def is_warm(outcome, encoded=0):
    """Whether a fit trained as without a cache, and encoded so much and nothing that was committed."""
    assert outcome["error"] is None, outcome
    assert (outcome["encoded"], outcome["again"]) == (encoded, 0)
    return outcome["as uncached"]


@pytest.mark.usefixtures("mounting")
class TestFull:
    def test_fill_stops_with_what_fits_and_goes_on_when_there_is_space(self, tmp_path):
        found = run(troubled_disk.full_disk, tmp_path / "out.json", folder=tmp_path)
        assert is_clear(found["full"], "StoreError", str(tmp_path / "disk/cache"), "No space left", "; free space")
        assert 0 < found["full"]["committed"] < ALL
        assert found["left"] == []
        assert is_clear(found["still full"], "StoreError", str(tmp_path / "disk/cache"), "No space left")
        assert found["still full"]["again"] == 0
        assert is_warm(found["freed"], ALL - found["still full"]["committed"]) and found["freed"]["warned"] == []
        assert is_warm(found["warm"])

    @pytest.mark.parametrize("times", [1, 2, 3])
    def test_disk_that_is_full_when_the_manifest_is_written(self, times, tmp_path):
        moment = "before opening for writing the manifest"
        found = run(troubled_disk.full_disk_at, tmp_path / "out.json", folder=tmp_path, moment=moment, times=times)
        assert is_clear(found["full"], "StoreError", str(tmp_path / "disk/cache"), "No space left", "; free space")
        assert found["full"]["committed"] == [0, 4 + 128, 4 + 2 * 128][times - 1]  # the first call has four items
        assert found["left"] == []
        # the shard of a manifest that could not be written is found again where there was no manifest before
        saved = ALL - found["freed"]["encoded"]
        assert found["full"]["committed"] <= saved and (times == 1 or found["full"]["committed"] == saved)
        assert is_warm(found["freed"], ALL - saved) and is_warm(found["warm"])

    def test_disk_that_is_full_when_the_index_table_is_written(self, tmp_path):
        moment = "before opening for writing an index table"
        found = run(troubled_disk.full_disk_at, tmp_path / "out.json", folder=tmp_path, moment=moment, times=1)
        assert is_clear(found["full"], "StoreError", str(tmp_path / "disk/cache/datasets"), "No space", "; free space")
        assert found["full"]["committed"] == ALL
        assert is_warm(found["freed"]) and is_warm(found["warm"])

    def test_disk_that_gets_full_at_any_moment(self, tmp_path):
        found = run(troubled_disk.harmed_at_each_moment, tmp_path / "out.json", folder=tmp_path, kind="full")
        assert len(found) > 50
        unclear = [case for case in found if not is_harmless(case) and case["harmed"]["error"]["kind"] != "StoreError"]
        assert not unclear, "\n".join(f"{case['moment']}: {case['harmed']['error']}" for case in unclear)
        for case in found:
            assert is_harmless(case) or is_clear(case["harmed"], "StoreError", str(tmp_path), "No space left"), case
            assert is_warm(case["after"], case["after"]["encoded"]), case
        assert sum(is_harmless(case) for case in found) < len(found) / 2


@pytest.mark.usefixtures("mounting")
class TestReadOnly:
    def test_directory_serves_a_warm_start_and_refuses_a_grown_dataset(self, tmp_path):
        found = run(troubled_disk.read_only_disk, tmp_path / "out.json", folder=tmp_path)
        assert is_warm(found["filled"], ALL)
        assert is_warm(found["warm"]) and found["warm"]["warned"] == []
        assert is_warm(found["other order"])
        grown = found["grown"]
        assert is_clear(grown, "StoreError", f"save_dir {tmp_path / 'disk/cache'}", "Read-only", "another save_dir")
        assert (grown["encoded"], grown["committed"]) == (0, ALL)
        assert is_warm(found["without manifest"], 8)  # rows that are compared, as where they were made is not known
        assert "has shards but no manifest" in found["without manifest"]["warned"][0]

    def test_empty_directory_is_refused_before_anything_is_encoded(self, tmp_path):
        found = run(troubled_disk.empty_read_only_disk, tmp_path / "out.json", folder=tmp_path)
        assert is_clear(found, "StoreError", f"save_dir {tmp_path / 'disk/cache'}", "Read-only", "another save_dir")
        assert found["encoded"] == 0


class TestGone:
    @pytest.mark.usefixtures("mounting")
    def test_disk_that_is_unmounted_in_the_middle_of_a_fill(self, tmp_path):
        found = run(troubled_disk.unmounted_disk, tmp_path / "out.json", folder=tmp_path)
        assert is_clear(found["gone"], "StoreError", str(tmp_path / "disk/cache"), "disappeared", "bring it back")
        assert found["found"] == []  # nothing was written to where the disk had been
        assert 0 < ALL - found["back"]["encoded"] <= 20 * 32
        assert is_warm(found["back"], found["back"]["encoded"]) and is_warm(found["warm"])

    def test_directory_that_is_deleted_in_the_middle_of_a_fill(self, tmp_path):
        found = run(troubled_disk.deleted_directory, tmp_path / "out.json", folder=tmp_path, call=20)
        assert is_clear(found["gone"], "StoreError", str(tmp_path / "cache"), "disappeared", "another save_dir")
        assert found["gone"]["encoded"] <= 20 * 32 + 128  # told at the next commit, not at the end
        assert not found["found"]
        assert is_warm(found["again"], ALL) and is_warm(found["warm"])

    def test_directory_that_is_deleted_at_any_moment(self, tmp_path):
        found = run(troubled_disk.harmed_at_each_moment, tmp_path / "out.json", folder=tmp_path, kind="deleted")
        assert len(found) > 50
        unclear = [case for case in found if not is_harmless(case) and case["harmed"]["error"]["kind"] != "StoreError"]
        assert not unclear, "\n".join(f"{case['moment']}: {case['harmed']['error']}" for case in unclear)
        for case in found:
            assert is_harmless(case) or is_clear(case["harmed"], "StoreError", str(tmp_path)), case
            assert is_warm(case["after"], case["after"]["encoded"]), case
        assert sum(is_harmless(case) for case in found) < len(found) / 2

    @pytest.mark.parametrize("place", ["", "encoders", "datasets"])
    def test_file_where_a_directory_should_be(self, place, tmp_path):
        found = run(troubled_disk.directory_that_is_a_file, tmp_path / "out.json", folder=tmp_path, place=place)
        assert is_clear(found["file"], "StoreError", str(tmp_path / "cache"), "irectory")
        assert place == "datasets" or found["file"]["encoded"] == 0
        assert found["content"] == "mine"


@pytest.fixture
def folder():
    """A folder that every user may enter; those of pytest belong to one alone."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    if (path / "cache").exists():
        troubled_disk.permit(path / "cache")
    shutil.rmtree(path)


class TestForbidden:
    @pytest.mark.parametrize("mode", [0o555, 0o111, 0o000])
    def test_save_dir_that_may_not_be_written_is_refused_before_anything_is_encoded(self, mode, folder):
        found = run(troubled_disk.forbidden, folder / "out.json", folder=folder, harm=None, mode=mode)
        assert is_clear(found, "StoreError", str(folder / "cache"), "Permission denied", "; permit")
        assert found["encoded"] == 0

    def test_directory_that_may_only_be_read_serves_a_warm_start(self, folder):
        found = run(troubled_disk.forbidden, folder / "out.json", folder=folder, harm="**/", mode=0o555)
        assert is_warm(found) and found["warned"] == []

    def test_directory_that_may_only_be_read_refuses_a_grown_dataset(self, folder):
        found = run(troubled_disk.forbidden, folder / "out.json", folder=folder, harm="**/", mode=0o555, grown=True)
        assert is_clear(found, "StoreError", f"save_dir {folder / 'cache'}", "Permission denied", "; permit writing")
        assert found["encoded"] == 0

    @pytest.mark.parametrize("harm", ["", "encoders", "encoders/*", "encoders/*/manifest.json", "encoders/*/shard-*"])
    def test_rows_that_may_not_be_read_are_neither_encoded_again_nor_given_up(self, harm, folder):
        found = run(troubled_disk.forbidden, folder / "out.json", folder=folder, harm=harm, mode=0o000)
        assert is_clear(found, "StoreError", str(folder / "cache"), "Permission denied", "permit")
        assert found["encoded"] == 0
        troubled_disk.permit(folder / "cache")
        assert len(only_store(folder / "cache")) == ALL

    def test_index_tables_that_may_not_be_read_are_passed_over_with_a_warning(self, folder):
        found = run(troubled_disk.forbidden, folder / "out.json", folder=folder, harm="datasets/*", mode=0o000)
        assert found["error"] is None, found["error"]
        assert is_warm(found) and "Permission denied" in found["warned"][0]
