/* A page that is opened from disk may not start a Worker, which the search needs: an iframe does its work. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script>
        window.postMessage = message => parent.dispatchEvent(new CustomEvent("from-worker", {detail: [window, message]}));
        window.importScripts = (...urls) => Promise.all(urls.map(url => new Promise((done, failed) => {
          const script = document.createElement("script");
          Object.assign(script, {src: url, onload: done, onerror: failed});
          document.head.append(script);
        })));
      </script><script src="${new URL(url, document.baseURI)}"></script>`;
      this.ready = new Promise(done => frame.addEventListener("load", () => done(frame.contentWindow)));
      this.frame = frame;
      window.addEventListener("from-worker", event => {
        if (event.detail[0] === frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", {data: event.detail[1]}));
      });
      document.body.append(frame);
    }
    postMessage(data) {
      this.ready.then(scope => scope.dispatchEvent(new MessageEvent("message", {data})));
    }
    terminate() {
      this.frame.remove();
    }
  };
