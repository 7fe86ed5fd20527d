"""The script that shows LA-DAPO from top to bottom."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_it_trains_and_can_be_read_in_one_go(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import la_dapo_in_one_file

    assert len(Path(la_dapo_in_one_file.__file__).read_text().splitlines()) <= 200
    try:
        first, second = la_dapo_in_one_file.main([str(tmp_path), "--steps", "2", "--prompts", "2", "--rollouts", "4"])
    finally:
        sys.modules.pop("la_dapo_in_one_file")
    for report in (first, second):
        assert 0 < report["rollout_gap/text_max"] < 1e-4 and 0 < report["rollout_gap/latent_max"] < 1e-4
        assert report["grad_norm"] > 0
    assert first["latent/kl_ref"] == 0 < second["latent/kl_ref"]  # the first step moved the latents
    assert "step 2: reward " in capsys.readouterr().out
