"""An embodiment written as a file alone: where values come from, in which form, and every spelling mistake named."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from env_client.wire import CameraSpec, InvalidInput

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.embodiment import SLOTS, choose_embodiment, load_embodiment
from grasp_cube.policies.observation import ObservationReader
from grasp_cube.policies.openpi_checkpoint import slotted_cameras
from grasp_cube.policies.openpi_config import load_openpi_config
from grasp_cube.policies.openpi_write import embodiment_yaml
from grasp_cube.policies.policy import PolicyError, PolicyRequest

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str, name: str = "mine") -> str:
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


def reader(name: str, size: int = 16) -> ObservationReader:
    embodiment = load_embodiment(name)
    cameras = [CameraSpec(camera.name, size, size, "stretch") for camera in embodiment.cameras]
    return ObservationReader(cameras, embodiment.states, embodiment=embodiment)


def droid(**changes) -> dict:
    """What openpi's DROID client sends, with flat keys."""
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (16, 16, 3), np.uint8)
    obs = {
        "observation/exterior_image_1_left": image,
        "observation/wrist_image_left": image[::-1],
        "observation/joint_position": np.arange(7, dtype=np.float64),
        "observation/gripper_position": np.array([0.5]),
        "prompt": "go",
    }
    return {key: value for key, value in (obs | changes).items() if value is not None}


@pytest.mark.parametrize(
    "name",
    [
        "so101",
        "bi_so101",
        "astribot_s1_16",
        "astribot_s1_22",
        "astribot_s1_25",
        "aloha",
        "droid",
        "libero",
    ],
)
def test_the_shipped_embodiments_fit_openpis_models(name):
    """Each has a base image, distinct slots, and no more values than the model's 32."""
    embodiment = load_embodiment(name)
    slots = [camera.slot for camera in slotted_cameras(embodiment)]
    assert slots[0] == SLOTS[0]
    assert len(slots) == len(set(slots))
    state, action = sum(part.size for part in embodiment.states), len(embodiment.action_names)
    assert 0 < action <= 32
    assert 0 < state <= 32
    embodiment.convert.check(state, action, name)


def test_every_published_config_names_an_embodiment_that_its_mask_fits():
    table = yaml.safe_load((ROOT / "configs" / "openpi.yaml").read_text())
    for name in table:
        config = load_openpi_config(name)
        assert config.model == ("pi05" if name.startswith("pi05") else "pi0")
        embodiment = load_embodiment(config.embodiment)
        assert sum(map(abs, config.delta)) in (0, len(embodiment.action_names)), name
        assert config.horizon
        assert config.asset_id


def test_flat_and_nested_keys_and_a_scalar_gripper():
    flat = reader("droid").frame(droid())
    nested = {"observation": {key.partition("/")[2]: value for key, value in droid().items() if "/" in key}}
    nested["observation"]["gripper_position"] = np.float64(0.5)
    again = reader("droid").frame(nested)
    np.testing.assert_array_equal(flat.state, [0, 1, 2, 3, 4, 5, 6, 0.5])
    np.testing.assert_array_equal(again.state, flat.state)
    for name, image in flat.images.items():
        np.testing.assert_array_equal(again.images[name], image)


def test_other_forms_of_an_image_only_where_they_are_allowed():
    """(3, H, W) and floats from 0 to 1, as openpi turns them into uint8: 255 times, cut off."""
    plain = reader("droid").frame(droid())
    image = droid()["observation/exterior_image_1_left"]
    first = reader("droid").frame(droid(**{"observation/exterior_image_1_left": image.transpose(2, 0, 1)}))
    np.testing.assert_array_equal(first.images["exterior_1_left"], plain.images["exterior_1_left"])
    share = np.full((16, 16, 3), 0.5, np.float32)
    half = reader("droid").frame(droid(**{"observation/exterior_image_1_left": share}))
    assert set(np.unique(half.images["exterior_1_left"])) == {127}
    for wrong in (share * 3, share - 1, np.full((16, 16, 3), np.nan, np.float32)):
        with pytest.raises(InvalidInput, match=r"'exterior_1_left'.*float32.*uint8"):
            reader("droid").check(PolicyRequest(droid(**{"observation/exterior_image_1_left": wrong})))
    so101 = {"images": {"front": image.transpose(2, 0, 1), "wrist": image}, "states": {"arm": np.zeros(6)}}
    with pytest.raises(InvalidInput, match=r"'front'.*\[3, 16, 16\]"):
        reader("so101").frame(so101)


def test_what_is_missing_is_named_by_its_key():
    with pytest.raises(InvalidInput, match=r"'wrist_left' is missing .*'observation/wrist_image_left'"):
        reader("droid").frame(droid(**{"observation/wrist_image_left": None}))
    with pytest.raises(InvalidInput, match=r"'gripper' is missing .*'observation/gripper_position' with 1"):
        reader("droid").frame(droid(**{"observation/gripper_position": None}))
    with pytest.raises(InvalidInput, match=r"observation/joint_position .* \[6\]; \(7,\)"):
        reader("droid").frame(droid(**{"observation/joint_position": np.zeros(6)}))


def test_an_optional_camera_may_be_absent_but_not_all():
    """ALOHA: only the camera above is needed."""
    image = np.zeros((3, 16, 16), np.uint8)
    obs = {"images": {"cam_high": image}, "state": np.zeros(14)}
    assert list(reader("aloha").frame(obs).images) == ["cam_high"]
    with pytest.raises(InvalidInput, match="'cam_high' is missing"):
        reader("aloha").frame({"images": {"cam_left_wrist": image}, "state": np.zeros(14)})


def test_a_file_changes_its_base(tmp_path):
    """A base that is a file has one itself; a camera is added, changed and taken away."""
    write(tmp_path, "base: so101\nunit: degrees\nprompt: go\n", "one")
    mine = load_embodiment(
        write(
            tmp_path,
            f"base: {tmp_path}/one.yaml\ncameras:\n  front: false\n  top: {{slot: base_0_rgb, keys: [image]}}\n"
            "convert: [{values: [5], scale: 0.01}]\n",
        )
    )
    assert (mine.name, mine.unit, mine.prompt, mine.fps) == ("mine", "degrees", "go", 30)
    assert [camera.name for camera in mine.cameras] == ["wrist", "top"]
    assert [camera.name for camera in slotted_cameras(mine)] == ["top", "wrist"]
    np.testing.assert_allclose(mine.convert.state(np.full(6, 50.0)), [50] * 5 + [0.5])


def test_a_written_embodiment_reads_back(tmp_path):
    """What a conversion leaves beside its config says everything itself, also for six values."""
    text = "base: so101\ncameras:\n  front: false\n  top: {slot: base_0_rgb, optional: true}\n"
    text += "convert: [{values: [5], scale: 0.01, of: action}, {values: [0], curve: aloha_gripper}]\nprompt: 'ja: nein'\n"
    mine = load_embodiment(write(tmp_path, text))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "embodiment.yaml").write_text(embodiment_yaml(mine, "Made here."))
    again = choose_embodiment(PolicyConfig(), folder, None, 6, 6)
    assert (again.cameras, again.states, again.prompt) == (mine.cameras, mine.states, "ja: nein")
    values = np.linspace(0.1, 0.9, 6)
    np.testing.assert_array_equal(again.convert.actions(values), mine.convert.actions(values))
    np.testing.assert_array_equal(again.convert.state(values), mine.convert.state(values))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: mine.yaml\n", "is its own base"),
        ("base: nobody\n", "'nobody' is not one of the embodiments"),
        ("cameras: {top: {slot: base}}\n", "slot of the camera top .*base_0_rgb"),
        ("base: so101\ncameras: {top: {slot: base_0_rgb}}\n", "two cameras .* same slot"),
        ("cameras: {top: {keys: image}}\n", "keys of the camera top"),
        ("cameras: {top: {optional: 3}}\n", "optional of the camera top"),
        ("states: [{name: arm, size: 6, keys: [3]}]\n", "keys of the state arm"),
        ("image_forms: [bgr]\n", "'bgr'; channels_first, float"),
        ("delta: [6, 0]\n", "delta .*runs such as"),
        ("delta: 6\n", "delta .*list was expected"),
        ("convert: [{values: [1]}, 3]\n", "an entry of convert"),
        ("clean_prompt: 1\n", "clean_prompt .*bool was expected"),
    ],
)
def test_spelling_mistakes_are_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError, match=words):
        load_embodiment(write(tmp_path, text))
