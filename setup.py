"""What pyproject.toml cannot say: the configuration files of `conf/` are installed as the package `fusion.conf`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fusion", "fusion.*"]), "fusion.conf"],
    package_dir={"fusion.conf": "conf"},
    package_data={
        "fusion.chat": ["*.html"],
        "fusion.conf": ["**/*.yaml"],
        "fusion.dialogues": ["templates/*.jinja"],
        "fusion.evaluation": ["prompts/*", "*.j2"],
        "fusion.tracking": ["*.j2", "drawings/*"],
    },
)
