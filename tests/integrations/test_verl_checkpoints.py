"""verl's checkpoints after kills at any moment of a save: which one a run goes on from, and which ones are there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.integrations.verl.checkpoints import Checkpoints
from future_l1_plugin.resume import MARKER, seal

NAMES = ["model", "optim", "extra_state"]


class Killed(BaseException):
    pass


def actor_files(actor, world_size=2):
    return [actor / f"{name}_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size) for name in NAMES]


def saved(folder, step):
    """A checkpoint as verl leaves one, before it is sealed."""
    path = Path(folder) / f"global_step_{step}"
    (path / "actor").mkdir(parents=True, exist_ok=True)
    for file in [*actor_files(path / "actor"), path / "data.pt"]:
        file.write_text(f"{file.name} of step {step}")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(step))
    return path


def whole(folder, step):
    seal(saved(folder, step))
    return Path(folder) / f"global_step_{step}"


def checkpoints(folder, said=None):
    return Checkpoints(folder, (said if said is not None else []).append)


def there(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def tracker(folder):
    return (folder / "latest_checkpointed_iteration.txt").read_text()


def test_the_files_are_the_truth_not_the_tracker(tmp_path):
    whole(tmp_path, 2)
    whole(tmp_path, 10)
    for text in ("", "2"):  # killed while verl wrote it, and before
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        assert checkpoints(tmp_path).settle() == 10
        assert tracker(tmp_path) == "10"
    (saved(tmp_path, 12) / "data.pt").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    lines = []
    assert checkpoints(tmp_path, lines).settle() == 10
    assert lines == [f"passed over {tmp_path}/global_step_12: its saving did not come to an end"]


def test_one_that_verl_saved_by_itself_is_taken_at_its_word(tmp_path):
    saved(tmp_path, 2)
    saved(tmp_path, 4)
    assert checkpoints(tmp_path).settle() == 4


def test_one_whose_files_somebody_took_away_is_passed_over_but_never_trained_anew(tmp_path):
    whole(tmp_path, 4)
    (whole(tmp_path, 6) / "data.pt").unlink()
    lines = []
    assert checkpoints(tmp_path, lines).settle() == 4
    assert lines == [f"passed over {tmp_path}/global_step_6: data.pt is missing"]
    (tmp_path / "global_step_4" / "data.pt").write_text("")
    with pytest.raises(CheckpointError, match=r"global_step_6: data\.pt is missing, and no other checkpoint is whole"):
        checkpoints(tmp_path).settle()


def test_nothing_whole_is_said_and_starts_anew(tmp_path):
    saved(tmp_path, 2)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    lines = []
    assert checkpoints(tmp_path, lines).settle() is None
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()
    assert lines[1] == f"no checkpoint in {tmp_path} is whole: training starts from its beginning"
    assert checkpoints(tmp_path / "not_there", lines).settle() is None
    assert len(lines) == 2, "an empty folder is no news"


def test_as_many_are_kept_over_resumes(tmp_path):
    for step in range(1, 6):  # each save by a process of its own
        one = checkpoints(tmp_path)
        one.settle()
        one.make_way(step)
        saved(tmp_path, step)
        one.retain(step, 2)
    assert there(tmp_path) == ["global_step_4", "global_step_5"]
    checkpoints(tmp_path).retain(5, None)
    assert there(tmp_path) == ["global_step_4", "global_step_5"], "null keeps all"


def test_what_was_passed_over_does_not_count_among_those_kept(tmp_path):
    whole(tmp_path, 2)
    saved(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    one = checkpoints(tmp_path)
    one.settle()
    one.make_way(3)  # saved more often than before
    saved(tmp_path, 3)
    one.retain(3, 2)
    assert there(tmp_path) == ["global_step_2", "global_step_3"]


def test_a_run_that_begins_anew_leaves_those_of_an_earlier_one_alone(tmp_path):
    for step in (2, 10):
        whole(tmp_path, step)
    new = checkpoints(tmp_path)
    new.begin()
    assert checkpoints(tmp_path).settle() is None, "killed before its first save, it must not go on from another's"
    new.make_way(2)
    saved(tmp_path, 2)
    new.retain(2, 1)
    assert there(tmp_path) == ["global_step_10", "global_step_2"]
    assert checkpoints(tmp_path).settle() == 2
    again = checkpoints(tmp_path)
    again.begin(2)  # trainer.resume_mode=resume_path, of the same folder
    assert again.settle() == 2
    again.make_way(10)
    assert not (tmp_path / "global_step_10").exists(), "nothing of the earlier run's is mixed with this one's"
    saved(tmp_path, 10)
    again.retain(10, None)
    assert checkpoints(tmp_path).settle() == 10


class Workers:
    """What verl's worker group does in a save, as far as its files go; killed at the `dies`-th file."""

    def __init__(self, dies=None):
        self.dies, self.written, self.asked = dies, 0, []

    def save_checkpoint(self, local_path, remote_path, step, max_ckpt_to_keep=None):
        self.asked.append(max_ckpt_to_keep)
        Path(local_path).mkdir(parents=True, exist_ok=True)
        for file in actor_files(Path(local_path)):
            self.written += 1
            if self.written == self.dies:
                raise Killed
            file.write_text(str(step))


def trainer(folder, dies=None, **keys):
    """Ours, as far as saving and loading go: verl's own `_save_checkpoint` runs within."""
    from omegaconf import OmegaConf

    from future_l1_plugin.integrations.verl.trainer import LaDapoTrainer

    one = object.__new__(LaDapoTrainer)
    section = {"default_local_dir": str(folder), "resume_mode": "auto", "default_hdfs_dir": None, **keys}
    one.config = OmegaConf.create({"trainer": section, "actor_rollout_ref": {"actor": {"checkpoint": {}}}})
    one.actor_rollout_wg = Workers(dies)
    one.use_critic = False
    one.train_dataset = SimpleNamespace(prompts=[])
    one.train_dataloader = SimpleNamespace(state_dict=lambda: {"at": one.global_steps})
    one.checkpoint_callback = SimpleNamespace(on_save=lambda **kwargs: None)
    return one


@pytest.fixture
def loads(monkeypatch):
    """verl's `_load_checkpoint` only tells which step it would load; the guard of settings is not asked."""
    pytest.importorskip("verl")
    import verl.trainer.ppo.v1.trainer_base as base
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    import future_l1_plugin.integrations.verl.trainer as ours

    def load(self):
        found = None
        if self.config.trainer.resume_mode == "auto":
            found = find_latest_ckpt_path(self.config.trainer.default_local_dir)
        elif self.config.trainer.resume_mode == "resume_path":
            found = self.config.trainer.resume_from_path
        self.global_steps = int(found.split("global_step_")[-1]) if found else 0

    monkeypatch.setattr(base.PPOTrainer, "_load_checkpoint", load)
    monkeypatch.setattr(ours, "check_same_run", lambda *_: None)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("dies", [1, 2, 3, 4, 5, 6, "data", "tracker", "seal"])
def test_a_kill_at_any_file_of_a_save_leaves_one_to_go_on_from(tmp_path, dies, monkeypatch):
    """keep=1, where verl removes the only whole one before the data loader's state and the tracker are written."""
    first = trainer(tmp_path, max_actor_ckpt_to_keep=1)
    first._load_checkpoint()
    first.global_steps = 2
    first._save_checkpoint()
    assert first.actor_rollout_wg.asked == [None], "verl removes nothing by itself"
    assert first.config.trainer.max_actor_ckpt_to_keep == 1

    def killed(*args, **kwargs):
        raise Killed

    second = trainer(tmp_path, dies, max_actor_ckpt_to_keep=1)
    second._load_checkpoint()
    second.global_steps = 4
    with monkeypatch.context() as patched, pytest.raises(Killed):
        if dies == "data":
            second.train_dataloader.state_dict = killed
        if dies == "tracker":
            second.checkpoint_callback.on_save = killed
        if dies == "seal":
            patched.setattr("future_l1_plugin.integrations.verl.checkpoints.seal", killed)
        second._save_checkpoint()
    if dies == "tracker":
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    third = trainer(tmp_path, max_actor_ckpt_to_keep=1)
    third._load_checkpoint()
    assert third.global_steps == (4 if dies == "seal" else 2), "verl's own word came before the seal"
    third.global_steps = 4
    third._save_checkpoint()
    assert there(tmp_path) == ["global_step_4"]
    assert (tmp_path / "global_step_4" / MARKER).exists()
    assert torch.load(tmp_path / "global_step_4" / "data.pt") == {"at": 4}


@pytest.mark.usefixtures("loads")
def test_a_named_checkpoint_must_be_whole(tmp_path):
    path = whole(tmp_path / "old", 4)
    actor_files(path / "actor")[0].write_text("")
    one = trainer(tmp_path / "new", resume_mode="resume_path", resume_from_path=str(path))
    with pytest.raises(CheckpointError, match=r"global_step_4: actor/model_world_size_2_rank_0\.pt has 0 bytes, exp"):
        one._load_checkpoint()


@pytest.mark.parametrize(("prompts", "refused"), [(5, True), (6, False)])
def test_fewer_prompts_than_a_batch_are_said_before_anything_starts(monkeypatch, prompts, refused):
    pytest.importorskip("verl")
    import verl.trainer.ppo.v1.trainer_base as base
    from omegaconf import OmegaConf

    import future_l1_plugin.integrations.verl.trainer as ours
    from future_l1_plugin.errors import ConfigError

    def load(self):
        self.train_dataset, self.val_dataloader = [None] * prompts, None

    monkeypatch.setattr(base.PPOTrainer, "_init_dataloader", load)
    monkeypatch.setattr(ours, "even_out", lambda loader: None)
    one = object.__new__(ours.LaDapoTrainer)
    one.config = OmegaConf.create({"data": {"train_batch_size": 6}})
    if not refused:
        return one._init_dataloader()
    with pytest.raises(ConfigError, match=r"takes 6 different prompts, data\.train_files hold 5.*ppo_mini_.* to 5$"):
        one._init_dataloader()
