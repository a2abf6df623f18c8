# JupyterLab on the series for one learner, with the bundled model; running it needs no network.
#
#   docker build -t course --build-arg PIP_EXTRA_INDEX_URL=INDEX .     CPU; INDEX holds torch's builds named +cpu
#   docker build -t course --build-arg DEVICE=cuda .                  GPUs; run it with --gpus all
#   docker run -p 127.0.0.1:8888:8888 -v course:/home/learner/course course
#
# An index that asks for a password stays out of the image: docker build --secret id=pip,src=pip.conf
FROM debian:bookworm-20260918-slim@sha256:3783cc01769c7b2b1b83a5c5ad96c815348e28ed7da68e2e3687004faa906251

ARG DEVICE=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

# The large layer depends on these three files only, so a change in a notebook does not make it anew.
RUN --mount=type=bind,source=requirements.txt,target=/src/requirements.txt \
    --mount=type=bind,source=requirements.lock,target=/src/requirements.lock \
    --mount=type=bind,source=deploy/install.sh,target=/src/deploy/install.sh \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    COURSE_DEVICE=$DEVICE /src/deploy/install.sh packages

RUN --mount=type=bind,target=/src /src/deploy/install.sh course

USER 1000
WORKDIR /home/learner
ENV COURSE_IP=0.0.0.0
EXPOSE 8888
VOLUME /home/learner/course
HEALTHCHECK --start-period=60s --timeout=5s CMD ["/opt/course/.venv/bin/python", "/opt/course/deploy/health.py"]
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/course/deploy/start.sh"]
