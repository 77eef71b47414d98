"""What the names in a config stood for at a run's first start, and what has changed since."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from ddpo.basics.part import is_off
from ddpo.preferences import PairFiles
from ddpo.prompts import Prompt, prompt_set_digest
from ddpo.rewards import Reward
from ddpo.rewards.identity import SOURCE, RewardIdentity
from ddpo.rewards.registry import source_files


class Pins(BaseModel):
    """What a run's prompt set, reward and preference pairs were at its first start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: str
    """Digest of the prompts."""
    reward: str
    """Digest of the reward's identity."""
    reward_id: str
    """Id of the reward, 'NAME-<digest8>'."""
    reward_version: str
    """The version in that identity."""
    reward_revisions: dict[str, str]
    """The revisions of models in that identity."""
    preferences: str | None = Field(default=None, exclude_if=is_off)
    """Digest of the files with its preference pairs; None without any."""

    @classmethod
    def of(cls, prompts: Sequence[Prompt], reward: Reward, pairs: PairFiles | None = None) -> Pins:
        """Return what prompts, a reward and preference pairs are now."""
        identity = reward.identity
        return cls(
            prompts=prompt_set_digest(prompts),
            reward=identity.digest,
            reward_id=identity.reward_id,
            reward_version=identity.version,
            reward_revisions=dict(identity.revisions),
            preferences=pairs.digest if pairs else None,
        )

    def change_of_prompts(self, now: str, name: str) -> str | None:
        """Say how the prompts differ from those of the first start, and what to do about it.

        Args:
            now: Their digest now.
            name: The prompt set's name in the config.

        Returns:
            A sentence; None if they are the same.
        """
        if now == self.prompts:
            return None
        return (
            f"digests.prompts: {self.prompts} at the first start, {now} now: the prompts of "
            f"{name!r} have changed. Restore them, or start another run"
        )

    def change_of_preferences(self, now: str | None, path: str) -> str | None:
        """Say how the preference pairs differ from those of the first start; see above.

        Args:
            now: Their digest now.
            path: The files' in the config.
        """
        if now == self.preferences:
            return None
        return (
            f"digests.preferences: {self.preferences} at the first start, {now} now: the "
            f"preference pairs in {path} have changed. Restore them, or start another run"
        )

    def change_of_reward(self, now: RewardIdentity, name: str) -> str | None:
        """Say how and why the reward differs from that of the first start; see above.

        Args:
            now: Its identity now.
            name: The reward's name in the config.
        """
        if now.digest == self.reward:
            return None
        return (
            f"digests.reward: {self.reward} ({self.reward_id}) at the first start, {now.digest} "
            f"({now.reward_id}) now: {self._reason(now, name)}"
        )

    def _reason(self, now: RewardIdentity, name: str) -> str:
        restore = "restore the original reward, or score with the new one in a fork (`ddpo fork`)"
        old, new = self.reward_version, now.version
        if old != new and old.startswith(SOURCE) and new.startswith(SOURCE):
            return (
                f"the source of {name!r} in {', '.join(source_files(name))} has changed, if only "
                "in a comment. If the scores are the same, give the reward the attribute "
                f"version = {old!r}; otherwise {restore}"
            )
        if old != new:
            return f"its version was {old!r} and is {new!r}; {restore}"
        revisions = self.reward_revisions
        changed = [
            model
            for model in sorted({*revisions, *now.revisions})
            if revisions.get(model) != now.revisions.get(model)
        ]
        if changed:
            return f"the weights of {', '.join(changed)} have changed; {restore}"
        return f"its name or its parameters have changed; {restore}"
