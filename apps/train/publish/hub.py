"""Models in folders and on a hub, with the three methods of huggingface_hub's ``ModelHubMixin``.

The mixin is not a base class here: it would be imported at every start, and record the arguments of each module once
more. ``push_to_hub`` is the mixin's own; it saves the model by the ``save_pretrained`` of this class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from apps.base.messages import first_line
from apps.train.checkpoint.linked import LinkedModule
from apps.train.checkpoint.paths import is_pretrained
from apps.train.publish import pretrained
from apps.train.publish.model_card import ModelKind, card, measured

_FILES = (pretrained.PRETRAINED, pretrained.WEIGHTS, pretrained.ENCODING, "*.trees.txt", "README.md")


class HubModule(LinkedModule):
    """A module that is saved as a pretrained folder, and loaded from one or from a hub."""

    model_kind: ClassVar[ModelKind] = ModelKind()
    """What the card of every model of this class says."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        run: str | Path | None = None,
        overwrite: bool = False,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push: Any,
    ) -> str | None:
        """Write the model as a folder that ``apps.load`` and ``from_pretrained`` read: all of it, or nothing.

        It has the weights as safetensors, ``config.json`` with the values that rebuild the model and the meaning of its
        data's numbers, and a card, ``README.md``. The card has the figures of ``moesaic test`` if the run's folder
        has a test of these very weights. Its license is for you to add.

        Args:
            save_directory: a folder that is new or empty.
            run: the run's folder, which may have a test; None: from the checkpoint that the model was loaded from.
            overwrite: replace an earlier folder of ``save_pretrained``, its card included. Other folders stay.
            repo_id: repository for ``push_to_hub``; None: the folder's name.
            push_to_hub: upload the folder as well.
            config: the mixin's, which is written by itself here: None.
            model_card_kwargs: more for the card: ``name``, its title instead of the folder's name.
            push: options of ``push_to_hub``.

        Returns:
            the commit's address if the model is pushed.

        Raises:
            ValueError: the folder holds other files; or a tensor is sharded over processes.
        """
        if config is not None:
            raise ValueError(f"config={config!r}: a model's own arguments are written, and no others")
        folder = Path(save_directory)
        contents: dict[str, Any] = {}
        self.on_save_checkpoint(contents)
        state = self.state_dict()
        with pretrained.new_folder(folder, overwrite) as temporary:
            pretrained.write(temporary, {"hyper_parameters": dict(self.hparams), **contents, "state_dict": state})
            self.save_beside(temporary)
            figures = measured(self._run if run is None else Path(run), state)
            name = (model_card_kwargs or {}).get("name", folder.resolve().name)
            (temporary / "README.md").write_text(card(name, self, figures), encoding="utf-8")
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.resolve().name, **push)
        return None

    def save_beside(self, folder: Path) -> None:
        """Write files that belong to the model into a pretrained folder: by default none."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to a hub, as one commit, and return the commit's address.

        Args:
            repo_id: the repository, such as "owner/name", which is created if it does not exist.
            options: passed to ``huggingface_hub.ModelHubMixin.push_to_hub``: ``private``, ``token``, ``branch``,
                ``commit_message``, ``create_pr``, ...
        """
        from huggingface_hub import ModelHubMixin

        return str(ModelHubMixin.push_to_hub(self, repo_id, **options))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        **download: Any,
    ) -> Self:
        """Return the model of a pretrained folder or of a repository on a hub, ready to predict.

        Args:
            pretrained_model_name_or_path: a folder of ``save_pretrained``; else the name of a repository, whose files
                are fetched into the cache of huggingface_hub.
            device: device for the weights.
            download: options of ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``force_download``.

        Raises:
            ValueError: the folder is damaged or has another model, or the repository does not exist.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            folder = _fetched(str(pretrained_model_name_or_path), download)
        elif not is_pretrained(folder):
            raise ValueError(f"{folder} is no folder of save_pretrained: it has no {pretrained.PRETRAINED}")
        from apps.train.checkpoint.loading import load

        model = load(folder, device)
        if not isinstance(model, cls):
            raise ValueError(
                f"{folder} holds a model of class {type(model).__name__}, and {cls.__name__} was asked for"
            )
        return model

    @property
    def _run(self) -> Path | None:
        """The folder of the run of the module's checkpoint; None: it was loaded from none."""
        path = self.loaded_from
        return None if path is None else path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _fetched(repository: str, options: dict[str, Any]) -> Path:
    """Return the folder of a repository's files in the cache of huggingface_hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_FILES), **options))
    except TypeError:  # an option that is none
        raise
    except Exception as error:  # of the hub, of its client, of the network
        raise ValueError(f"{repository!r} is no folder here, and cannot be fetched: {first_line(error)}") from error
